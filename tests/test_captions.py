import functools
import re
import subprocess
import sys

import numpy as np
import pytest

from visbio_diffusers.captions import available_banks, load_bank
from visbio_diffusers.wording import fit_articles, fold, realise


shipped_bank = functools.cache(load_bank)

MEDMNIST = (
    ("adrenalmnist3d", 2),
    ("bloodmnist", 8),
    ("breastmnist", 2),
    ("chestmnist", 14),
    ("dermamnist", 7),
    ("fracturemnist3d", 3),
    ("nodulemnist3d", 2),
    ("octmnist", 4),
    ("organamnist", 11),
    ("organcmnist", 11),
    ("organmnist3d", 11),
    ("organsmnist", 11),
    ("pathmnist", 9),
    ("pneumoniamnist", 2),
    ("retinamnist", 5),
    ("synapsemnist3d", 2),
    ("tissuemnist", 8),
    ("vesselmnist3d", 2),
)
RICH = ("bloodmnist", "pathmnist", "pneumoniamnist")
BLOOD = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocytes",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)
SUBTYPES = {
    3: ("promyelocyte", "myelocyte", "metamyelocyte"),
    6: ("band neutrophil", "segmented neutrophil"),
}
OWN_BANK = """
classes:
  cat:
    synonyms: [a cat, a (tom|house) cat]
    descriptions: [a small animal with whiskers]
  eel:
    synonyms: [an eel]
    descriptions: [a long fish]
templates: ["{}", "a photo of {}"]
"""


@pytest.fixture(scope="module")
def blood():
    return shipped_bank("bloodmnist")


@pytest.fixture
def bank_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def wordings(texts):
    """Return how many wordings the alternatives in `texts` allow, at least, counted by drawing."""
    rng = np.random.default_rng(0)
    return len({realise(text, rng) for text in texts for _ in range(20)})


def test_the_banks_are_the_medmnist_sets():
    assert tuple((name, len(shipped_bank(name).class_names)) for name in available_banks()) == MEDMNIST


@pytest.mark.parametrize("name", [name for name, _ in MEDMNIST])
def test_every_class_has_what_it_needs(name):
    bank = shipped_bank(name)
    assert bank.license.startswith("CC BY") and bank.source
    assert len(set(bank.templates)) >= (40 if name in RICH else 8)
    assert len(bank.heldout_templates) >= 5
    for words in (*bank.classes, *filter(None, [bank.no_finding])):
        assert len(set(words.synonyms)) >= 3, words.name
        assert len(set(words.descriptions)) >= 3, words.name
        assert len(set(words.heldout_descriptions)) >= 5, words.name


@pytest.mark.parametrize("name", [name for name, _ in MEDMNIST if name.endswith("3d")])
def test_captions_of_slices_name_no_plane(name):
    bank = shipped_bank(name)
    for label in range(len(bank.classes)):
        captions = [*bank.pool(label, 100, 0), *bank.heldout_captions(label), bank.plain_caption(label)]
        assert not re.search(r"\b(axial|coronal|sagittal|transverse|frontal)\b", " ".join(captions))


def test_blood_bank_is_rich(blood):
    assert blood.class_names == BLOOD
    for words in blood.classes:
        assert tuple(words.subtypes) == SUBTYPES.get(BLOOD.index(words.name), ())
        assert len(set(words.synonyms)) >= 14 and len(set(words.descriptions)) >= 20, words.name
        assert wordings(text for texts in words.key.values() for text in texts) >= 40, words.name
        assert wordings(text for texts in words.attributes.values() for text in texts) >= 90, words.name


@pytest.mark.parametrize("name", RICH)
def test_pools_are_distinct_and_never_hold_a_heldout_wording(name):
    bank = shipped_bank(name)
    for label, words in enumerate(bank.classes):
        pool = bank.pool(label, 800, seed=0)
        assert len(set(pool)) == len(pool) == 800
        assert not [text for text in pool if re.search(r"[()|<>{}]|  | ,|^ | $", text)]
        heldout = bank.heldout_captions(label)
        assert not set(pool) & set(heldout) and len(heldout) == len(set(heldout))
        folded = [fold(text) for text in pool]
        for description in map(fold, words.heldout_descriptions):
            assert any(description in fold(text) for text in heldout)
            assert not any(description in text for text in folded), description


def test_a_generated_heldout_wording_is_drawn_again(bank_file):
    own_words = "[a long fish, a (long|grey) eel]\n    heldout_descriptions: [a gray eel]"
    text = OWN_BANK.replace("[a long fish]", own_words)
    pool = load_bank(bank_file(text)).pool(1, 100, seed=0)
    assert "a photo of a long eel" in pool and not any("gr" in text for text in pool)


def test_heldout_captions_start_with_one_of_each_description(blood):
    words = blood.classes[5]
    first = blood.heldout_captions(5)[: len(words.heldout_descriptions)]
    assert all(fit_articles(text) in caption for text, caption in zip(words.heldout_descriptions, first, strict=True))


def test_pool_is_the_same_in_another_process(blood):
    code = "from visbio_diffusers.captions import load_bank as b; print(*b('bloodmnist_64').pool(3, 50, 7), sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    other = result.stdout.splitlines()
    assert other == blood.pool(3, 50, 7)
    assert other != blood.pool(3, 50, 8)


@pytest.mark.parametrize(("label", "subtype"), [(label, name) for label, names in SUBTYPES.items() for name in names])
def test_subtype_captions_name_no_other_subtype(blood, label, subtype):
    pool = blood.pool(label, 800, seed=1, subtype=subtype)
    words = blood.classes[label]
    foreign = {name for other in SUBTYPES[label] if other != subtype for name in words.subtypes[other].synonyms}
    foreign -= {*words.synonyms, *words.subtypes[subtype].synonyms}
    names = re.compile(r"(?<![\w-])(?:" + "|".join(map(re.escape, foreign)) + r")(?!\w)")
    assert not [text for text in pool if names.search(text)]
    assert sum(subtype in text for text in pool) > 20


def test_parent_as_subtype_takes_only_class_level_words(blood):
    text = " ".join(blood.pool(6, 800, seed=0, subtype="neutrophil"))
    assert not re.search(r"three to five|stab|C-shaped|beads on a", text)
    anything = " ".join(blood.pool(6, 800, seed=0))
    assert "C-shaped" in anything and "three to five" in anything


@pytest.mark.parametrize(
    ("text", "fitted"),
    [
        ("a eosinophil", "an eosinophil"),
        ("an monocyte, a oval nucleus", "a monocyte, an oval nucleus"),
        ("a nRBC, a PMN, a NRBC, an WBC, a IG", "an nRBC, a PMN, an NRBC, a WBC, an IG"),
        ("an uniform rim, a unindented, an U-shaped one", "a uniform rim, an unindented, a U-shaped one"),
        ("a S-shaped and an C-shaped nucleus", "an S-shaped and a C-shaped nucleus"),
        ("a H&E image of an urinary bladder", "an H&E image of a urinary bladder"),
        ("A orange cell in an NEUT", "An orange cell in a NEUT"),
    ],
)
def test_articles_follow_the_sound(text, fitted):
    assert fit_articles(text) == fitted


def test_every_caption_has_fitting_articles(blood):
    for label in range(8):
        for text in (*blood.pool(label, 300, seed=2), *blood.heldout_captions(label), blood.plain_caption(label)):
            assert not re.search(
                r"\ba [aeio]|\ban [bcdfgjklmnpqrstvwyz](?!RBC)|\ba an?\b|\ban? (?:an?|the)\b", text
            ), text


def test_plain_captions(blood):
    assert blood.plain_caption(1) == "a microscopy image of an eosinophil"
    assert blood.plain_caption(3) == "a microscopy image of an immature granulocyte"
    assert shipped_bank("retinamnist").plain_caption(0) == (
        "a fundus photograph of diabetic retinopathy grade 0 (no apparent retinopathy)"
    )


def test_multi_label_captions_name_every_finding_and_only_those():
    bank = shipped_bank("chestmnist")
    findings = np.zeros(14, dtype=np.uint8)
    assert bank.plain_caption(findings) == "a frontal chest radiograph showing no finding"
    findings[[2, 3]] = 1
    assert bank.plain_caption(findings) == "a frontal chest radiograph showing effusion and infiltration"
    pool = bank.pool(findings, 300, seed=0)
    present, absent = bank.classes[2:4], (*bank.classes[:2], *bank.classes[4:])
    for text in map(fold, pool):
        assert all(any(fold(name) in text for name in words.synonyms) for words in present), text
        assert not any(fold(words.synonyms[0]) in text for words in absent), text
    both = [text for text in pool if "effusion" in text and "infiltration" in text]
    assert {text.index("effusion") < text.index("infiltration") for text in both} == {True, False}


def test_own_bank(bank_file):
    bank = load_bank(bank_file(OWN_BANK))
    assert bank.class_names == ("cat", "eel") and bank.name == "mine"
    assert "a photo of a tom cat" in bank.pool(0, 1000, seed=0)
    assert len(bank.pool(0, 1000, seed=0)) < 30
    assert bank.heldout_captions(0) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("synonyms: [an eel]", "synonyms: [an eel", " line 8: not valid YAML"),
        ("synonyms: [an eel]", "synonyms: []", " line 7: 'eel' needs a non-empty list of `synonyms`"),
        ("    synonyms: [an eel]\n", "", " line 6: 'eel' needs a non-empty list of `synonyms`"),
        ("synonyms: [an eel]", "synonyms: [1]", " line 7: `synonyms` of 'eel' must be a list of texts, not '1'"),
        (
            "synonyms: [an eel]",
            "synonyms:\n    - an eel\n    -",
            " line 9: `synonyms` of 'eel' must be a list of texts",
        ),
        ("synonyms: [an eel]", "synonyms: 1", " line 7: `synonyms` of 'eel' must be a list of texts"),
        ("synonyms: [an eel]", "synonyms: [an <eel>]", " line 7: <eel> in `synonyms` of 'eel'"),
        ("synonyms: [an eel]", "synonym: [an eel]", " line 7: 'eel' knows no key `synonym`: did you mean `synonyms`?"),
        ("templates: ", "template: ", " line 9: the bank knows no key `template`: did you mean `templates`?"),
        ("[a long fish]", "[a long fish]\n    synonyms: [a worm]", " line 9: 'synonyms' stands in line 7 already"),
        ("  eel:", "  cat:", " line 6: 'cat' stands in line 3 already"),
        ("  eel:", "  ? [eel]\n  :", " line 6: a key must be a text"),
        ('["{}", "a photo of {}"]', '\n- "{}"\n- a photo', " line 11: the template 'a photo' must contain {} once"),
        ('"a photo of {}"]', '"a {}"]\nheldout_templates: ["a {}"]', " line 10: 'a {}' stands in `templates` too"),
        ("[a long fish]", "[a long fish]\n    heldout_descriptions: [long fish]", " line 9: the held-out description"),
        ("[a long fish]", "[a long fish]\n    key: [a fin]", " line 9: `key` of 'eel' must be a mapping"),
        ("  eel:", "  dog: woof\n  eel:", " line 6: 'dog' must be a mapping"),
        ("templates: ", "macros: {fin: 1}\ntemplates: ", " line 9: `fin` in `macros` of the bank must be a text"),
        ("templates: ", "multi_label: true\ntemplates: ", "`no_finding` of the bank needs a non-empty list"),
        ("an eel", "an \0eel", " line 7: holds the control character 0x0"),
        ("an eel", "!!python/name:eel an eel", " line 7: could not determine a constructor"),
        (OWN_BANK, "just words", "the bank must be a mapping"),
        (OWN_BANK, "templates: ['{}']", "`classes` must map"),
    ],
)
def test_malformed_bank_is_named_with_its_line(bank_file, old, new, message):
    assert old in OWN_BANK
    with pytest.raises(ValueError) as caught:
        load_bank(bank_file(OWN_BANK.replace(old, new)))
    assert message in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("latin-1", r"mine\.yaml line 5: byte 0xe4 is not UTF-8.* -f ISO-8859-1"), ("utf-16", r"line 1: .* -f UTF-16")],
)
def test_bank_in_another_encoding(tmp_path, encoding, message):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN_BANK.replace("whiskers", "Schn\u00e4uzer"), encoding=encoding)
    with pytest.raises(ValueError, match=message):
        load_bank(path)


def test_bank_with_references_byte_order_mark_and_keys_that_yaml_takes_for_other_values(tmp_path):
    text = OWN_BANK.replace("  eel:", "  no: &eel").replace(
        "templates:", "  1:\n    <<: *eel\n    prompt: one\ntemplates:"
    )
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8-sig")
    bank = load_bank(tmp_path / "mine.yaml")
    assert bank.class_names == ("cat", "no", "1")
    assert bank.classes[2].synonyms == ("an eel",) and bank.plain_caption(2) == "an image of one"


def test_unknown_names_suggest_the_nearest(blood, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'bloodmnist'"):
        load_bank("bloodmnits_64")
    with pytest.raises(FileNotFoundError):
        load_bank(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="did you mean 'band neutrophil'"):
        blood.caption(6, np.random.default_rng(0), subtype="band neutrofil")


@pytest.mark.parametrize(
    ("name", "label", "message"),
    [("bloodmnist", 8, "0 to 7"), ("bloodmnist", -1, "0 to 7"), ("bloodmnist", [0] * 8, "as an integer"),
     ("chestmnist", [1, 0], "vector of length 14"), ("chestmnist", [2] * 14, "0/1")],
)  # fmt: skip
def test_labels_outside_the_bank(name, label, message):
    with pytest.raises(ValueError, match=message):
        shipped_bank(name).caption(label, np.random.default_rng(0))


def test_blood_subtypes_are_those_of_the_data(visbio_data, blood):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(visbio_data / "pbc64" / "train.parquet", columns=["label", "subtype"])
    rng = np.random.default_rng(0)
    for label, subtype in set(zip(table["label"].to_pylist(), table["subtype"].to_pylist(), strict=True)):
        assert blood.caption(int(label), rng, subtype)
