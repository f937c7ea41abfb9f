"""The Markov source against its own mathematics, the text against its own bytes, and the texts that are none."""

import builtins
import errno
import gzip
import itertools
import os

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from xentlab import LabError
from xentlab.sources import PARTS, MarkovSource, Text, builtin_text


@pytest.mark.parametrize("order", [1, 2])
def test_entropy_rate_equals_a_sum_over_all_blocks(order):
    """H(rate) = H(n + 1 tokens) - H(n tokens) of the stationary chain, by enumeration: exact from n = order on."""
    source = MarkovSource(vocab=3, order=order, seed=1)

    def block_entropy(length):
        total = 0.0
        for block in itertools.product(range(3), repeat=length):
            row = sum(token * 3 ** (order - 1 - i) for i, token in enumerate(block[:order]))
            p = source.stationary[row]
            for i in range(order, length):
                row = sum(token * 3 ** (order - 1 - j) for j, token in enumerate(block[i - order : i]))
                p *= source.table[row, block[i]]
            total -= p * np.log(p)
        return total

    assert source.entropy_rate == pytest.approx(block_entropy(order + 2) - block_entropy(order + 1), abs=1e-12)


def test_the_long_run_of_a_chain_of_many_contexts_is_one_step_later_the_same():
    """Of more than are solved at once."""
    source = MarkovSource(vocab=11, order=3)
    later = np.arange(11**3)[:, None] % 11**2 * 11 + np.arange(11)
    moved = np.bincount(later.reshape(-1), weights=(source.stationary[:, None] * source.table).reshape(-1))
    assert np.abs(moved - source.stationary).sum() < 1e-12


def test_a_chain_that_hardly_mixes_has_its_long_run():
    """Against the sum over spanning trees (the Markov chain tree theorem), in which nothing cancels."""
    source = MarkovSource(vocab=4, exponent=20.0, seed=0)
    moves, trees = source.table, np.zeros(4)
    for root in range(4):
        others = [place for place in range(4) if place != root]
        for parents in itertools.product(range(4), repeat=3):
            step = dict(zip(others, parents, strict=True))
            if all(_leads_to(root, each, step) for each in others):
                trees[root] += np.prod([moves[each, step[each]] for each in others])
    np.testing.assert_allclose(source.stationary, trees / trees.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("exponent", "seed", "message"),
    [
        (2000.0, 1, r"falls into parts that it never leaves\. Take an exponent nearer to 0 than 2000"),
        (900.0, 11, r"products of probabilities that are 0 in float64\. Take an exponent nearer to 0 than 900"),
    ],
)
def test_a_chain_that_falls_apart_is_told(exponent, seed, message):
    with pytest.raises(LabError, match=message):
        _ = MarkovSource(vocab=4, exponent=exponent, seed=seed).stationary


def _leads_to(root, place, step):
    for _ in range(4):
        place = step.get(place, root)
    return place == root


@pytest.mark.parametrize("order", [1, 2])
def test_samples_follow_the_law(order):
    source = MarkovSource(vocab=4, order=order, seed=2, tokens=100_000)
    tokens = np.concatenate([source.split(part) for part in PARTS])
    contexts = np.stack([tokens[i : len(tokens) - order + i] for i in range(order)], -1)
    counts = np.zeros((4**order, 4))
    np.add.at(counts, (np.asarray(source._row(jnp.asarray(contexts))), tokens[order:]), 1)
    seen = counts / counts.sum(1, keepdims=True)
    # Five standard errors of a binomial share, for each of the 16 or 64 cells, and the 63 joints of the stream.
    allowed = 5 * np.sqrt(source.table * (1 - source.table) / counts.sum(1, keepdims=True)) + 5e-3
    assert (np.abs(seen - source.table) < allowed).all()
    np.testing.assert_allclose(counts.sum(1) / counts.sum(), source.stationary, atol=0.01)


def test_the_law_is_zipf_like_and_differs_by_context():
    source = MarkovSource(vocab=64, seed=0)
    ordered = np.sort(source.table, axis=1)[:, ::-1].mean(0)
    slope = np.polyfit(np.log(np.arange(1, 33)), np.log(ordered[:32]), 1)[0]
    assert -1.6 < slope < -0.8
    assert len(np.unique(source.table.argmax(1))) > 20
    np.testing.assert_allclose(source.table.sum(1), 1, rtol=1e-12)


def test_law_reads_the_last_token_last():
    source = MarkovSource(vocab=3, order=2, seed=0)
    np.testing.assert_allclose(source.law(jnp.array([1, 2])), source.table[1 * 3 + 2], rtol=1e-6)
    with pytest.raises(LabError, match="2 tokens; got 1"):
        source.law(jnp.array([1]))


def test_a_stream_is_split_eight_to_one_to_one():
    source = MarkovSource(vocab=4, tokens=1000)
    assert [len(source.split(part)) for part in PARTS] == [800, 100, 100]


def test_same_seed_same_tokens():
    first, again, other = (MarkovSource(seed=s, tokens=20_000).split("train") for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    chains = MarkovSource(vocab=4).sample(jax.random.key(0), 50, 3)
    assert chains.shape == (3, 50)
    assert len({tuple(np.asarray(chain)) for chain in chains}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": 1}, "vocab >= 2"),
        ({"order": 0}, "order >= 1"),
        ({"order": 9}, "smaller vocabulary"),
        ({"tokens": 5}, "at least 10"),
        ({"seed": -1}, "a seed is a whole number from 0 to 4294967295; got -1"),
        ({"seed": 2**32}, "from 0 to 4294967295"),
        ({"vocab": 4.0}, "vocab >= 2 and order >= 1, whole numbers; got 4.0 and 1"),
        ({"vocab": "4"}, "whole numbers; got '4' and 1"),
        ({"order": 1.0}, "whole numbers; got 32 and 1.0"),
        ({"order": True}, "whole numbers; got 32 and True"),
        ({"seed": 1.5}, "a seed is a whole number .*; got 1.5"),
        ({"tokens": 10.5}, "at least 10; got 10.5"),
        ({"exponent": "a"}, "an exponent is a finite number; got 'a'"),
        ({"exponent": float("nan")}, "a finite number; got nan"),
        ({"exponent": float("inf")}, "a finite number; got inf"),
        ({"exponent": jnp.ones(2)}, "a finite number; got Array"),
    ],
)
def test_markov_refuses(arguments, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=message):
        MarkovSource(**arguments)


def test_numbers_of_arrays_are_pythons_own(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    given = MarkovSource(np.int64(4), jnp.int32(1), jnp.float32(1), np.uint8(3), jnp.array(100))
    assert given == MarkovSource(4, 1, 1.0, 3, 100)
    assert {type(value) for value in given.describe().values()} == {str, int, float}
    assert len(given.split("train")) == 80


def test_a_chain_that_ends_in_one_part_has_its_long_run_there():
    """Where probabilities are 0 in float64: the third context leads to the first, and that to the second."""
    ends = MarkovSource(vocab=3, exponent=2000, seed=59)
    assert ends.table.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert ends.stationary.tolist() == [0, 1, 0]
    assert set(ends.split("train").tolist()) == {1}
    assert ends.entropy_rate == 0


@pytest.mark.parametrize("table", [np.eye(2)[[0, 1] * 1024], np.eye(2)[[0, 1] * 512]])
def test_a_chain_of_two_ends_has_no_long_run_of_its_own(table):
    """Of all zeros it stays there, and of all ones; power iteration would say where it began."""
    source = MarkovSource(vocab=2, order=len(table).bit_length() - 1)
    vars(source)["table"] = table
    with pytest.raises(LabError, match="in float64 this chain falls into parts that it never leaves"):
        _ = source.stationary


def test_parts_are_the_text_in_order_and_do_not_overlap():
    text = Text()
    whole = "".join(text.decode(text.split(part)) for part in PARTS)
    assert whole == builtin_text()
    assert len(whole) > 300_000
    assert len(text.describe()["sha256"]) == 64
    assert len(text.split("train")) > 10 * len(text.split("test"))


def test_no_passage_of_the_builtin_text_is_trained_on_and_tested():
    parts = {part: bytes(Text().split(part).astype(np.uint8)) for part in PARTS}
    size = 100
    trained = {parts["train"][start : start + size] for start in range(len(parts["train"]) - size)}
    for part in ("validation", "test"):
        assert not trained & {parts[part][start : start + size] for start in range(len(parts[part]) - size)}


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_bytes(("Größe – naïve café; 你好, wörld! \r\n" * 200).encode())
    return path


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_any_text_survives_its_tokens(prose, tokenizer):
    text = Text(prose, tokenizer, bpe_vocab=300)
    for part in PARTS:
        tokens = text.split(part)
        assert tokens.dtype == np.int32
        assert 0 <= tokens.min() <= tokens.max() < text.vocab
    assert text.describe()["tokenizer"] == tokenizer
    whole = "".join(text.decode(text.split(part)) for part in PARTS)
    assert whole == prose.read_bytes().decode()
    total = sum(int(text.token_bytes[text.split(part)].sum()) for part in PARTS)
    assert total == len(prose.read_bytes())


def test_bpe_is_trained_on_the_training_part_alone(tmp_path):
    path = tmp_path / "late.txt"
    path.write_text("abcd " * 1000 + "zqzq " * 60)
    assert not any("zq" in token for token in Text(path, "bpe", bpe_vocab=300)._bpe.get_vocab())


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "book.txt").write_text("home " * 200)
    assert Text("~/book.txt").text == "home " * 200


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    folder = tmp_path / "many"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_text("b" * 1000)
    (folder / "deep" / "c.md").write_text("c" * 1000)
    (folder / "a.txt").write_text("a" * 1000)
    (folder / ".hidden").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("d" * 1000)
    assert Text(folder).text == "a" * 1000 + "\n" + "b" * 1000 + "\n" + "c" * 1000
    assert Text(folder).name == "many"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file or folder"),
        (b"", "is empty"),
        (b" \n" * 900, "is blank"),
        (b"short", "5 characters, too few"),
        (gzip.compress(os.urandom(2000)), "not UTF-8.*Unpack it first"),
        (b"a" * 2000 + b"\xe9t\xe9", "not UTF-8: byte 2000 is 0xe9.*iconv -f latin1"),
        (("é" * 2000).encode("utf-16"), "not UTF-8: byte 0 is 0xff.*iconv -f utf-16"),
        (b"\xfe\xff" + ("é" * 2000).encode("utf-16-be"), "not UTF-8: byte 0 is 0xfe.*iconv -f utf-16"),
        (("é" * 2000).encode("utf-32"), "not UTF-8: byte 0 is 0xff.*iconv -f utf-32"),
        (b"\0\0\xfe\xff" + ("é" * 2000).encode("utf-32-be"), "not UTF-8: byte 2 is 0xfe.*iconv -f utf-32"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LabError, match=message):
        Text(path)


def test_a_folder_s_links_are_followed_once_and_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "many", tmp_path / "elsewhere"
    for place, letter in ((folder, "a"), (elsewhere, "b")):
        place.mkdir()
        (place / f"{letter}.txt").write_text(letter * 1000)
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert Text(folder).text == "a" * 1000 + "\n" + "b" * 1000
    scan = os.scandir

    def refused(path):
        if str(path).endswith("linked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(LabError, match=r"cannot read .*linked: Permission denied"):
        Text(folder)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LabError, match=r"can be read once, .* Write it into a file first"):
        Text(tmp_path / "pipe")


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"a" * 1000)
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf" + b"b" * 1000)
    assert Text(tmp_path).text == "a" * 1000 + "\n" + "b" * 1000


def test_other_refusals(tmp_path, prose, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    (tmp_path / "none").mkdir()
    with pytest.raises(LabError, match="no files in it"):
        Text(tmp_path / "none")
    for size in (256, 300.5, "300"):
        with pytest.raises(LabError, match=f"bpe_vocab > 256, a whole number; got {size!r}"):
            Text(prose, "bpe", bpe_vocab=size)
    with pytest.raises(LabError, match="the path of a UTF-8 file or of a folder of them; got 5"):
        Text(5)
    with pytest.raises(LabError, match="train, validation, test"):
        Text(prose).split("dev")
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: _without_tokenizers(real, name, *rest))
    with pytest.raises(LabError, match="pip install tokenizers"):
        _ = Text(prose, "bpe").vocab


def _without_tokenizers(real, name, *rest):
    if name == "tokenizers":
        raise ImportError(name)
    return real(name, *rest)


def test_after_a_token_that_is_none_no_law_is_known():
    source = MarkovSource(vocab=4, order=2)
    found = np.asarray(source.law(jnp.array([[0, 4], [-1, 0], [1, 0]])))
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2], source.table[4], rtol=1e-6)
