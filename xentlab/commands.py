"""The commands and their arguments, a dataclass each: what `--help` shows. `cli` runs them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from xentlab import defaults
from xentlab.console import Format

Losses = Annotated[
    tuple[str, ...], arg(help='names, with settings if need be: nll "focal(gamma=1)" ./mine.py:my_loss package.module:loss')
]
Out = Annotated[
    pathlib.Path | None,
    arg(
        help="folder to write into; made if need be, and a finished run of the same command in it is replaced (of "
        "races only with --anyway)"
    ),
]


@dataclasses.dataclass(frozen=True)
class List:
    """Every loss of the catalogue and of installed packages, with what is known of it.

    Example: xentlab list --format csv
    """

    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Show:
    """One loss: formula, gradient, source, facts, and where its code is.

    Example: xentlab show focal
    """

    loss: Positional[str]
    """a name of the list, or ./mine.py:my_loss"""
    vocab: int = 5
    """at what vocabulary it is tried, for a loss may know its own"""
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Each loss's value and gradient at chosen probabilities of the right token, in float64.

    The right token is class 0: a loss that weighs its classes has other numbers for the rest.

    Example: xentlab gradients --losses nll brier --probabilities .9 .1 .01 --rivals one
    """

    losses: Losses = defaults.LOSSES
    probabilities: tuple[float, ...] = defaults.PROBABILITIES
    """each strictly between 0 and 1"""
    vocab: int = 16
    """size of the vocabulary"""
    rivals: Literal["even", "one", "both"] = "even"
    """how p becomes small: the target's logit falls (even), or one rival rises (one), where p cannot reach 1/(V - 1)"""
    out: Out = None
    format: Format = "table"
    seed: int = 0
    """has no effect here: a profile draws nothing"""
    quick: bool = False
    """three probabilities only"""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Where a real batch's gradient goes, by the probability that your model gave each right token.

    The file is an .npz with arrays logits [..., V] and targets [...], or a .npy of logits with --targets.

    Example: xentlab budget batch.npz --losses nll focal
    """

    file: Positional[pathlib.Path]
    """.npz with logits and targets, or .npy of logits"""
    targets: pathlib.Path | None = None
    """.npy of targets, where the file holds logits alone"""
    losses: Losses = defaults.LOSSES
    bins: tuple[float, ...] = ()
    """rising edges of p from 0 to 1; by default 0 1e-4 1e-3 .01 .1 .25 .5 .75 .9 .99 1"""
    out: Out = None
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the head, linear_loss, costs at a shape, on one device or a mesh: compiled, never run.

    Needs no accelerator: of a mesh larger than this machine the devices are virtual ones of its CPU.

    Example: xentlab plan --tokens 8192 --features 2304 --vocab 256000 --loss brier --mesh data=8,model=32
    """

    tokens: int
    """N, tokens of a step, over all devices"""
    features: int
    """D, the width of the hidden states"""
    vocab: int
    """V"""
    loss: str = "nll"
    """a name of the list, or ./mine.py:my_loss"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mesh: str | None = None
    """data=8,model=32: devices that share the tokens, and the vocabulary"""
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Audit:
    """What is true of a loss, found from its values and gradients alone, with a witness for every "no".

    Example: xentlab audit nll focal ./mine.py:my_loss --format json
    """

    losses: Positional[tuple[str, ...]] = ()
    """names of the list, with settings if need be, or ./mine.py:my_loss"""
    all: bool = False
    """every loss of the catalogue"""
    vocab: int = 4
    """size of the vocabulary that all is asked at, 2 to 32: a loss may know its own"""
    seed: int = 0
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Race:
    """Train a model with each loss, at each loss's own best learning rate, and compare on held-out tokens.

    Losses are paired by their seeds; what differs is said with an interval. Each model is read through its loss's own link,
    mixed with the share of the uniform that validation likes best. With --out it writes its frames, run.json and
    pictures there, and keeps how far it has come: stopped by Ctrl-C or killed, it goes on with --resume, to the same numbers.

    Example: xentlab race --losses nll brier --text book.txt --steps 500 --seeds 5 --out runs/book
    """

    losses: Losses = defaults.LOSSES
    text: pathlib.Path | None = None
    """a UTF-8 file or folder; without it, the English that comes with Python"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bpe needs a package: pip install tokenizers"""
    bpe_vocab: int = defaults.BPE_VOCAB
    """tokens of the BPE vocabulary that is trained on the text"""
    markov: int | None = None
    """race on a Markov chain over this many tokens instead, whose law is known"""
    order: int = 1
    """how many tokens the Markov chain's law reads"""
    model: str = "mlp"
    """bigram, mlp or transformer, with options: "transformer(layers=3)"; or ./mine.py:function of (vocab, key)"""
    learning_rates: tuple[float, ...] = defaults.LEARNING_RATES
    extensions: int = defaults.EXTENSIONS
    """further rates, at most, while a loss's best one sits on the grid's edge"""
    steps: int = defaults.STEPS
    """of each run"""
    seeds: tuple[int, ...] = ()
    """one number: how many, from --seed on, by default three; several: the seeds themselves"""
    batch: int = defaults.BATCH
    """windows a step"""
    window: int = defaults.WINDOW
    """predicted tokens a window"""
    optimizer: str = defaults.OPTIMIZER
    """sgd, adam, adamw, muon or lion, with options: "sgd(momentum=.9)"; or ./mine.py:function of the rate's schedule"""
    schedule: str = defaults.SCHEDULE
    """constant, linear or cosine, with options: "cosine(warmup=.1)"; or ./mine.py:function of the number of steps"""
    clip: float | None = None
    """global norm to which the gradient is clipped"""
    label_noise: float = 0.0
    """share of the training targets that are another token; what is read, chosen by and tested on stays clean"""
    mesh: str | None = None
    """runs=2,data=4,model=2: devices for different runs, or to share a run's tokens, and vocabulary; virtual if need be"""
    hosts: str | None = None
    """HOST:PORT,COUNT,INDEX: this process and others race together, each started with its INDEX; or auto on a cluster"""
    out: Out = None
    resume: pathlib.Path | None = None
    """an unfinished race's folder: goes on there as it was begun, on the devices that --mesh and --hosts give it now"""
    anyway: bool = False
    """resume although arguments, text or versions differ; or replace the finished race in --out"""
    checkpoint_every: float = 10.0
    """seconds, at least, between two checkpoints; each is made after a block of steps"""
    seed: int = 0
    """the first of the --seeds where those are a count; and what a Markov chain's law and text are drawn by"""
    format: Format = "table"
    verbose: bool = False
    """say how the runs lie on this machine, and why"""
    quick: bool = False
    """20 steps, one rate, two seeds, where those are left at their defaults: only to see that all works"""


@dataclasses.dataclass(frozen=True)
class Scoreboard:
    """The four reasons for cross entropy as numbers, every loss a row: likelihood, code length, numerics, training signal.

    Races the losses on a text and on a Markov chain first, to have models to code with. With --out it writes
    scoreboard.csv, codes.csv, the coded files and run.json.

    Example: xentlab scoreboard --losses nll brier ./mine.py:my_loss --format json
    """

    losses: Losses = defaults.LOSSES
    all: bool = False
    """every loss of the catalogue; several minutes"""
    text: pathlib.Path | None = None
    """a UTF-8 file or folder; without it, the English that comes with Python"""
    out: Out = None
    seed: int = 0
    format: Format = "table"
    quick: bool = False
    """tiny races and no simulation: only to see that all works"""


@dataclasses.dataclass(frozen=True)
class Report:
    """Gradients, budgets, races, scoreboard and audit, as one page that opens without a network.

    Writes report.html, pictures, CSVs and run.json into --out (by default runs/report-<time>).

    Example: xentlab report --losses nll focal ./mine.py:my_loss --text book.txt
    """

    losses: Losses = defaults.LOSSES
    text: pathlib.Path | None = None
    """a UTF-8 file or folder; without it, the English that comes with Python"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """bpe needs a package: pip install tokenizers"""
    bpe_vocab: int = defaults.BPE_VOCAB
    out: Out = None
    seed: int = 0
    format: Format = "table"
    quick: bool = False
    """tiny races: only to see that all works"""


@dataclasses.dataclass(frozen=True)
class Tour:
    """The whole argument for cross entropy, claim by claim: runs each claim's experiment and writes one page to walk through.

    Writes tour.html, tour.json, pictures, CSVs and run.json into --out (by default runs/tour-<time>); a few minutes. Ends with
    exit code 1 if a number is not what it must be.

    Example: xentlab tour --format json
    """

    out: Out = None
    format: Format = "table"
    quick: bool = False
    """small sizes for the slow experiments; about a minute"""


@dataclasses.dataclass(frozen=True)
class Open:
    """A run's page in your browser.

    Example: xentlab open runs/report
    """

    run: Positional[pathlib.Path | None] = None
    """a report's or a tour's folder, or a page; by default the newest one under runs/"""
    print: bool = False
    """only print where the page is, for a machine without a browser"""


@dataclasses.dataclass(frozen=True)
class Api:
    """The package's API as pages, from its docstrings, into a run's folder. Needs pdoc: pip install pdoc.

    Example: xentlab api --out runs/api
    """

    out: Out = None


@dataclasses.dataclass(frozen=True)
class Compare:
    """Two runs side by side: what was set differently, and every number that came out differently.

    In csv and json what was set differently comes first, as rows whose frame is "settings".

    Example: xentlab compare runs/monday runs/tuesday --format csv
    """

    first: Positional[pathlib.Path]
    """a run's folder"""
    second: Positional[pathlib.Path]
    """another one"""
    all: bool = False
    """every number, and not only those that differ, of which a table shows the first 40"""
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Rerun:
    """Do a run again from its run.json, and compare: the same numbers to the last bit, or what differs.

    Ends with exit code 1 if a number differs. Takes runs of race, gradients, budget and scoreboard.

    Example: xentlab rerun runs/book --out runs/again
    """

    run: Positional[pathlib.Path]
    """the run's folder"""
    out: pathlib.Path | None = None
    """folder for the run that is made, one without a run; by default runs/rerun-<time>"""
    format: Format = "table"


COMMANDS = {
    "list": List,
    "show": Show,
    "gradients": Gradients,
    "budget": Budget,
    "plan": Plan,
    "audit": Audit,
    "race": Race,
    "scoreboard": Scoreboard,
    "report": Report,
    "tour": Tour,
    "compare": Compare,
    "rerun": Rerun,
    "open": Open,
    "api": Api,
}
