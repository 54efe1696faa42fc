"""One token per meaning, nothing unknown, the same ids as the libraries that read tokenizer.json."""

import csv
import gzip
import time

import numpy as np
import pytest

from cloud_lib.elements import SYMBOLS
from cloud_lib.representation import ABLATION_STYLES, STYLES, string
from cloud_lib.spacegroups import PUBLISHED_DEVIATIONS, generator, multiplicities, wyckoff_positions
from cloud_lib.symmetry import Orbit, SymmetryRecord
from cloud_lib.tokenizer import PARTS, SPECIALS, Tokenizer, UnknownTokenError


@pytest.fixture(scope="module")
def strings():
    """Every style of one synthetic crystal per group; all groups, Wyckoff symbols and elements occur."""
    made = []
    for n in range(1, 231):
        elements = [SYMBOLS[(3 * n + k) % len(SYMBOLS)] for k in range(3)]
        sizes = multiplicities(n)
        orbits = tuple(Orbit(elements[k % 3], p.letter, p.multiplicity, "")
                       for k, p in enumerate((*wyckoff_positions(n), wyckoff_positions(n)[-1])))
        amounts = {e: sum(o.multiplicity for o in orbits if o.element == e) for e in elements}
        record = SymmetryRecord(n, 0, "", orbits, {e: a for e, a in amounts.items() if a}, 1.0, 0.01, "none")
        assert all(sizes[o.wyckoff_letter] == o.multiplicity for o in orbits)
        made += [string(record, style) for style in STYLES + ABLATION_STYLES]
        made.append(string(record, "paper", "published"))
    return made


def test_vocabulary_is_closed_and_without_collisions():
    tokenizer = Tokenizer.default()
    assert (tokenizer.vocab_size, tokenizer.version) == (776, "cloud-1")
    assert sorted(tokenizer.vocab.values()) == list(range(776))
    assert [tokenizer.vocab[t] for t in SPECIALS] == [0, 1, 2, 3]
    # a word with two meanings has one token per meaning
    for letter in "BCFOYD":
        assert tokenizer.vocab[f"tr:{letter}"] != tokenizer.vocab[letter]
    assert len({tokenizer.vocab[f"{kind}:{n}"] for kind in ("flag", "count", "tail") for n in (0, 1)}) == 6
    counts = np.bincount(tokenizer.part_of_id)
    assert dict(zip(PARTS, counts.tolist())) == {
        "special": 5, "generator": 267, "wyckoff": 186 + 98, "element": 119, "fraction": 101}


def test_round_trip_and_distinct_ids(strings):
    tokenizer = Tokenizer.default()
    tokens, offsets = tokenizer.encode_many(strings)
    assert (tokens.dtype, offsets.dtype) == (np.uint16, np.int64)
    rows = [tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]
    assert rows == [tokenizer.encode(s) for s in strings]
    assert [tokenizer.decode(r) for r in rows] == strings
    assert len({tuple(r) for r in rows}) == len(set(strings))
    unused = {tokenizer.tokens[i] for i in set(range(tokenizer.vocab_size)) - set(tokens.tolist())}
    unused = {t for t in unused if not t.startswith(("x", "0.", "1.", "["))}
    assert unused == {"tr:A", "tr:G"}  # in no group's string


def test_every_part_has_its_own_ids(strings):
    """In a full string the first field is generator tokens only, the last elements and fractions only."""
    tokenizer = Tokenizer.default()
    for text in strings:
        if text.count("|") == 2:
            parts = tokenizer.part_of_id[tokenizer.encode(text)[1:-1]].tolist()
            first, second = [i for i, p in enumerate(parts) if p == 0]
            assert set(parts[:first]) <= {1} and set(parts[second + 1:]) == {3, 4}
            assert set(parts[first + 1:second]) <= {2, 3}


@pytest.mark.parametrize("text", ["1 0 0 | 1a | Xx 1.0", "1 0 0 | 7q | O 1.0", "1 0 0 | 1a | O 1.01",
                                  "2 0 0 | 1a | O 1.0", "1 0 0 | 1a | [MASK] tr:O"])
def test_unknown_tokens_are_errors(text):
    tokenizer = Tokenizer.default()
    for encode in (tokenizer.encode, lambda t: tokenizer.encode_many([t])):
        with pytest.raises(UnknownTokenError, match="unknown (token|generator) '"):
            encode(text)


def test_no_strings():
    tokens, offsets = Tokenizer.default().encode_many([])
    assert len(tokens) == 0 and offsets.tolist() == [0]


@pytest.mark.parametrize("make", [Tokenizer.default, Tokenizer.published])
def test_auto_tokenizer_gives_the_same_ids(make, strings, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make()
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    if tokenizer.version.startswith("published"):  # a published string: style paper, elements it knows
        strings = ["0 3 a D D O b O O D j O O D 0 | 8b 4a | Rb 0.33 Zr 0.17 O 0.5", "1 0 0 | 1a | At 1.0"]
    assert theirs(strings)["input_ids"] == [tokenizer.encode(s) for s in strings]
    assert len(theirs) == tokenizer.vocab_size and theirs.pad_token_id == tokenizer.pad_id
    assert theirs.decode(tokenizer.encode(strings[0]), skip_special_tokens=True) == strings[0]
    again = Tokenizer.load(tmp_path)
    assert (again.vocab, again.version) == (tokenizer.vocab, tokenizer.version)
    assert again.sha256 == tokenizer.sha256


def test_a_changed_vocabulary_is_noticed(tmp_path):
    Tokenizer.default().save(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"192l"', '"192L"'))
    with pytest.raises(ValueError, match="vocabulary changed: expected sha256"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path / "none")


def test_published_vocabulary():
    """Ids of the authors' files: [CLS] 0, [MASK] 4, fractions from 463; unseen elements fall apart."""
    tokenizer = Tokenizer.published()
    assert (tokenizer.vocab_size, tokenizer.cls_id, tokenizer.pad_id, tokenizer.mask_id) == (564, 0, 1, 4)
    assert (tokenizer.vocab["0.0"], tokenizer.vocab["1.0"], tokenizer.vocab["Rn"]) == (463, 563, 462)
    assert [tokenizer.tokens[i] for i in tokenizer.encode("At 0.5")] == ["[CLS]", "A", "##t", "0.5", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("At 0.5")) == "At 0.5"
    with pytest.raises(UnknownTokenError, match="unknown token 'ä'"):
        tokenizer.encode("ä")
    one_id = {tokenizer.encode(w)[1] for w in "OBCFDY"}
    assert set(tokenizer.part_of_id[list(one_id)].tolist()) == {1}


def test_published_ids_equal_berts(tmp_path):
    """On the class that the authors use, built from the same word list."""
    from transformers import BertTokenizer

    tokenizer = Tokenizer.published()
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.tokens[:463]) + "\n")
    theirs = BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=False)
    theirs.add_tokens(tokenizer.tokens[463:])
    texts = [f"{' '.join(generator(n, 'published'))} | {' '.join(p.symbol for p in wyckoff_positions(n))} | "
             f"{SYMBOLS[n % 118]} 0.12 {SYMBOLS[(n + 7) % 118]} 0.88" for n in range(1, 231)]
    assert set(PUBLISHED_DEVIATIONS) <= set(range(1, 231))
    assert [theirs(t)["input_ids"] for t in texts] == [tokenizer.encode(t) for t in texts]


def test_published_strings_pass_through(cloud_data):
    with gzip.open(cloud_data / "matbench" / "authors_dielectric_strings.csv.gz", "rt") as file:
        published = [row["string"] for row in csv.DictReader(file)]
    for tokenizer in (Tokenizer.default(), Tokenizer.published()):
        tokens, offsets = tokenizer.encode_many(published)
        assert [tokenizer.decode(tokens[a:b]) for a, b in zip(offsets[:-1], offsets[1:])] == published


def test_speed(strings):
    """Far below what a quiet core does (over 400,000 per second), so that only a real loss fails."""
    tokenizer = Tokenizer.default()
    canonical = strings[1::7] * 200
    started = time.process_time()
    tokenizer.encode_many(canonical)
    assert len(canonical) / (time.process_time() - started) > 50_000
