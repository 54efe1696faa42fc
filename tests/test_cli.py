import pytest

from cloud_lib import cli


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLOUD_ROOT", str(tmp_path))
    assert cli.main(["readme"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected ") and error.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="run make all PROFILE=demo"):
        cli.main(["--traceback", "readme"])


def test_interrupt_is_not_an_error_report(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_cmd_readme", interrupt)
    assert cli.main(["readme"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_imports_nothing_heavy():
    """Each command imports what it needs when it runs."""
    import subprocess
    import sys

    code = ("import sys, cloud_lib.cli as c; c.build_parser().format_help(); "
            "print({'torch', 'pandas', 'pymatgen', 'matplotlib'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
