"""The models that the paper compares with (Table 5), and the ones run here, each with the source of its numbers."""

from dataclasses import dataclass

import pandas as pd

LEADERBOARD = "MatBench leaderboard v0.1"
DISCOVERY = "Matbench Discovery leaderboard (10.1038/s42256-025-01055-1)"
UNCONVBENCH = "UnconvBench (arXiv:2407.16131)"
PAPER = "the CLOUD paper"
HERE = "run here"


@dataclass(frozen=True)
class Baseline:
    """One line of Table 5.

    `kind` and `architecture` are the paper's words; `citation` is a DOI or arXiv number. `matbench`, `discovery`
    and `unconvbench` name where the model's numbers in Table 1, in Tables 6-7 and in Table 2 come from, "" = not
    in that table.
    """

    name: str
    kind: str
    architecture: str
    citation: str
    matbench: str = ""
    discovery: str = ""
    unconvbench: str = ""

    @property
    def on_leaderboard(self) -> bool:
        """Whether MatBench's public leaderboard lists the model (the paper implies it of all but SLICES-BERT)."""
        return self.matbench == LEADERBOARD


STRUCTURE, AGNOSTIC, FREE = "structure-based", "structure-agnostic", "coordinate-free"
POTENTIAL, FEATURES = "structure-based (MLIP)", "feature-based"

PAPER_BASELINES = (
    Baseline("coGN", STRUCTURE, "GNN", "arXiv:2302.14102", matbench=LEADERBOARD, unconvbench=UNCONVBENCH),
    Baseline("coNGN", STRUCTURE, "GNN", "arXiv:2302.14102", matbench=LEADERBOARD, unconvbench=UNCONVBENCH),
    Baseline("ALIGNN", STRUCTURE, "GNN", "10.1038/s41524-021-00650-1", LEADERBOARD, DISCOVERY, UNCONVBENCH),
    Baseline("CGCNN", STRUCTURE, "GNN", "10.1103/PhysRevLett.120.145301", LEADERBOARD, DISCOVERY, UNCONVBENCH),
    Baseline("CrabNet", AGNOSTIC, "Transformer", "10.1038/s41524-021-00545-1", matbench=LEADERBOARD),
    Baseline("Finder", AGNOSTIC, "GNN", "10.1002/advs.202200164", matbench=LEADERBOARD),
    Baseline("Roost", AGNOSTIC, "GNN", "10.1038/s41467-020-19964-7", matbench=PAPER),
    Baseline("Wrenformer", FREE, "Transformer", "10.1038/s42256-025-01055-1", PAPER, DISCOVERY),
    Baseline("MatInFormer", FREE, "Transformer", "arXiv:2308.16259", matbench=PAPER),
    Baseline("SLICES-BERT", FREE, "Transformer", "10.1038/s41467-023-42870-7", matbench=PAPER),
    Baseline("SevenNet", POTENTIAL, "GNN", "10.1021/acs.jctc.4c00190", discovery=DISCOVERY),
    Baseline("MACE", POTENTIAL, "GNN", "arXiv:2206.07697", discovery=DISCOVERY),
    Baseline("CHGNet", POTENTIAL, "GNN", "10.1038/s42256-023-00716-3", discovery=DISCOVERY),
    Baseline("M3GNet", POTENTIAL, "GNN", "10.1038/s43588-022-00349-3", discovery=DISCOVERY),
    Baseline("MEGNet", STRUCTURE, "GNN", "10.1021/acs.chemmater.9b01294", discovery=DISCOVERY),
    Baseline("CGCNN+P", STRUCTURE, "GNN", "10.1038/s41524-022-00891-8", discovery=DISCOVERY),
    Baseline("BOWSR", STRUCTURE, "GNN", "10.1016/j.mattod.2021.08.012", discovery=DISCOVERY),
    Baseline("Voronoi RF", FEATURES, "Random Forest", "10.1103/PhysRevB.96.024104", discovery=DISCOVERY),
    Baseline("CrysToGraph", STRUCTURE, "Graph Transformer", "arXiv:2407.16131", unconvbench=UNCONVBENCH),
)
OWN_BASELINES = (
    Baseline("Dummy", "no input", "mean of the training rows", "", HERE, DISCOVERY, HERE),
    Baseline("from scratch", FREE, "Transformer", PAPER, HERE, "", HERE),
    Baseline("CLOUD (intermediate)", FREE, "Transformer, other labels learnt first", "arXiv:1811.01088", HERE),
    Baseline("CLOUD (ensemble)", FREE, "mean of CLOUD and CLOUD (intermediate)", "", HERE),
    Baseline("CLOUD (joint)", FREE, "Transformer, all tasks in one", "", HERE),
    Baseline("random forest", AGNOSTIC, "Random Forest", "10.1038/npjcompumats.2016.28", HERE),
    Baseline("BERT on composition", AGNOSTIC, "Transformer", "", HERE),
    Baseline("BERT on number", FREE, "Transformer, space-group number for generators", "arXiv:2308.16259", HERE),
    Baseline("BERT on no_wyckoff", FREE, "Transformer, no Wyckoff positions", "", HERE),
)


def baseline_table() -> pd.DataFrame:
    """Table 5, with the source of each model's numbers: the paper's models, then ours."""
    return pd.DataFrame([{
        "model": model.name,
        "type": model.kind,
        "architecture": model.architecture,
        "citation": model.citation or None,
        "on MatBench leaderboard": "yes" if model.on_leaderboard else "no" if model.matbench else None,
        "Table 1 from": model.matbench or None,
        "Table 2 from": model.unconvbench or None,
        "Table 6 from": model.discovery or None,
    } for model in (*PAPER_BASELINES, *OWN_BASELINES)])
