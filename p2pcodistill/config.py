"""Strict, frozen models of the files a user writes, and one clear line for everything that is wrong in them.

Unknown keys are errors that name the key and the nearest valid one; one file describes a run completely. `NodeConfig` is a
site's file (`nodes/`), `GroupSpec` is what a node writes for its ranks; the scenario file's model, which embeds these, is in
`simulation/scenario.py`. Fields carry their unit in their name; each is documented here and in the README.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from p2pcodistill.errors import ConfigError, IdentityError, UserError
from p2pcodistill.identity import PublicIdentity, check_site_name

MAX_CONFIG_FILE_BYTES = 1 << 20
_MAX_SHOWN_CHARS = 80


class StrictModel(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def _accepted_by(check: Callable[[str], object]) -> BeforeValidator:
    """Refuses the text that `check` does, in its words; what is no text is the model's to refuse."""

    def validate(value: object) -> object:
        try:
            if isinstance(value, str):
                check(value)
        except UserError as error:
            raise PydanticCustomError("user_error", "{why}", {"why": str(error)}) from None
        return value

    return BeforeValidator(validate)


SiteName = Annotated[str, _accepted_by(check_site_name)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CodistillationConfig(StrictModel):
    """When and how the student learns from its teachers (Anil et al. 2018, Algorithm 1)."""

    burn_in_steps: NonNegativeInt = 200
    """Steps before any distillation: early teachers are harmful, and models should stay diverse."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which the weight grows linearly from 0 after burn-in; 0 switches it on at once, as in the paper."""
    exchange_interval_steps: PositiveInt = 50
    """Steps between two published snapshots."""
    weight: NonNegativeFloat = 1.0
    """Factor of the distillation loss; the paper uses 1."""
    loss: Literal["soft-cross-entropy", "kl", "squared-error"] = "soft-cross-entropy"
    """psi: soft cross-entropy with the teachers' mean prediction, KL(teacher || student), or squared error on logits."""
    aggregation: Literal["mean-probabilities", "mean-logits", "mean-losses"] = "mean-probabilities"
    """How several teachers become one target: Anil et al. average predictions, Sodhani et al. the losses against each."""
    temperature: PositiveFloat = 1.0
    """Divides student's and teachers' logits in the distillation loss (scaled by its square); the paper uses 1."""
    agreement_interval_steps: PositiveInt = 5
    """Steps between two votes of the ranks on swapping teachers and on stopping."""
    teacher_precision: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """How a teacher's weights are kept in memory, apart from how they travel; `float32`: in the student's own dtypes."""
    teacher_average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Publish a moving average of the student with this decay a step (0.98: of some 50 steps); 0: the student as it is."""
    gate_margin: NonNegativeFloat = 1.0
    """A teacher whose loss on local batches exceeds the student's by more (nats) does not teach; 0: losses do not count."""
    max_staleness_steps: PositiveInt | None = None
    """A teacher more steps than this behind the newest version that it has announced does not teach; none: no limit."""
    max_age_s: PositiveFloat | None = None
    """A teacher whose version was announced here longer ago than this does not teach; none: no limit."""
    age_half_life_s: PositiveFloat | None = None
    """A teacher's weight, relative to the other teachers', halves with each such age; none: age does not count."""


class FramesConfig(StrictModel):
    """How this site's checkpoints travel: a keyframe first, then delta frames against what its students hold."""

    delta: Literal["adaptive", "ternary", "3-bit", "4-bit", "8-bit", "lossless", "off"] = "adaptive"
    """Codes of delta frames. `adaptive`: as coarse as the target allows; `lossless`: all the keyframe's bits."""
    keyframe: Literal["fp16", "bf16", "fp32", "int8"] = "fp16"
    """Precision of a chain's first keyframe. What it loses, the delta frames after it make up for."""
    target_error: Annotated[float, Field(gt=0, lt=1)] = 0.11
    """Constant quality: the error of what students decode (rms), as a share of the weights' own rms."""
    device: Literal["cpu", "model"] = "cpu"
    """Sender's snapshot and reference; `model`: they stay on the GPU (1.5 times the weights), only codes cross the bus."""
    exchange_budget_bytes: PositiveInt | None = None
    """Constant rate, in place of constant quality: as exact as this many bytes a delta frame allow."""


class TrainingConfig(StrictModel):
    """The reference training loop."""

    num_steps: PositiveInt = 2000
    """Updates of the whole run."""
    batch_size: PositiveInt = 32
    """Examples (documents, for the language model) per step and rank."""
    learning_rate: PositiveFloat = 2e-3
    """Peak rate of Adam."""
    learning_rate_schedule: Literal["cosine", "constant"] = "cosine"
    """`cosine` decays to zero over the run (a constant rate flatters codistillation)."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate first grows linearly."""
    max_gradient_norm: NonNegativeFloat = 1.0
    """Clip the global norm of the gradient to this; 0 does not clip."""
    seed: NonNegativeInt = 0
    """Seeds initialisation and example order, together with the site's name: sites differ under one seed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of forward passes. `auto`: bfloat16 where the processor computes it natively, else float32."""
    evaluation_interval_steps: PositiveInt = 50
    """Steps between two evaluations on held-out data."""
    checkpoint_interval_steps: PositiveInt = 250
    """Steps between two training checkpoints, from which a restarted group goes on."""
    report_interval_steps: PositiveInt = 10
    """Steps between two `step-measured` events."""

    def of_site(self, name: str) -> TrainingConfig:
        """The same for one site: its seed is made of the run's and of the site's name.

        Codistillation needs sites that start from different models (Anil et al. 2018, section 2).
        """
        text = f"p2pcodistill-seed/{self.seed}/{name}"
        # 31 bits; hashed, because ranks count up from it.
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
        return self.model_copy(update={"seed": seed})


class LanguageModelConfig(StrictModel):
    """The language-model task: a byte-level LSTM whose hidden state is carried across windows."""

    name: Literal["language-model"] = "language-model"
    """What is trained: a byte-level LSTM language model, its hidden state carried from window to window."""
    data: tuple[Path, ...] = ()
    """Files or folders of text of this site; empty: this site's share of the Python standard library's sources."""
    held_out: tuple[Path, ...] = ()
    """Files or folders to evaluate on; empty: a part of `data` that is then not trained on."""
    max_data_bytes: PositiveInt | None = None
    """Train on at most this much text."""
    max_held_out_bytes: PositiveInt = 32_768
    """Evaluate on at most this much text."""
    embedding_size: PositiveInt = 64
    """Width of a byte's embedding."""
    hidden_size: PositiveInt = 256
    """Width of each LSTM layer."""
    num_layers: PositiveInt = 2
    """LSTM layers."""
    window_bytes: PositiveInt = 32
    """Truncation length of back-propagation through time."""

    def located_in(self, base_folder: Path) -> LanguageModelConfig:
        """The same task with absolute paths; relative ones mean `base_folder`."""
        data, held_out = (
            tuple((base_folder / path).absolute() for path in paths) for paths in (self.data, self.held_out)
        )
        return self.model_copy(update={"data": data, "held_out": held_out})


class GroupConfig(StrictModel):
    """The site's workers."""

    num_ranks: PositiveInt = 1
    """Workers of the DDP group on this machine, one a GPU where there are GPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: GPUs if there is one for each rank, else the CPU."""
    num_threads: PositiveInt = 1
    """CPU threads of each rank."""
    script: Path | None = None
    """Your own training script, run by torchrun in place of the reference loop; it calls `p2pcodistill.join`."""
    script_arguments: tuple[str, ...] = ()
    """Arguments of your script."""
    max_restarts: NonNegativeInt = 3
    """Restarts after crashes of the group within one life of the node."""
    restart_delay_s: PositiveFloat = 1.0
    """Delay before the first restart; doubles with each further one, at most 60 s."""
    stop_grace_s: PositiveFloat = 60.0
    """Time for the ranks to agree on a step, checkpoint and exit before they are killed."""


class PeerConfig(StrictModel):
    """A member of the run other than this site."""

    name: SiteName
    """The peer's name."""
    public_identity: Annotated[str, _accepted_by(PublicIdentity.parse)]
    """The line that `p2pcodistill keygen` printed at the peer's site."""
    address: str | None = None
    """Where the peer listens, `tcp://host:port`; leave it out for a peer that dials us (behind NAT)."""
    max_upload_mbit: PositiveFloat | None = None
    """Send at most so many megabits a second to this peer; none: as much as the link takes."""

    @property
    def identity(self) -> PublicIdentity:
        """The parsed public identity."""
        return PublicIdentity.parse(self.public_identity)


class NodeConfig(StrictModel):
    """A site's file: `p2pcodistill node FILE`. Paths are relative to the folder of the file."""

    name: SiteName
    """This site's name, as its peers call it."""
    run: SiteName = "run"
    """Name of the run; nodes of different runs refuse each other."""
    listen: str = "tcp://127.0.0.1:5600"
    """Address to listen on; use `tcp://0.0.0.0:PORT` to be reachable from other machines."""
    identity: Path | None = None
    """The identity file; `<name>.key` by default."""
    run_folder: Path | None = None
    """Everything of this run at this site; `runs/<run>-<name>` by default."""
    topology: str = "pair"
    """Who teaches whom: a name such as `ring`, a graph file, or a schedule; see `p2pcodistill topology --help`."""
    peers: tuple[PeerConfig, ...] = ()
    """The other members, each a table `[[peers]]`; none for a site alone."""
    members: tuple[SiteName, ...] = ()
    """All sites in the order that every node uses; sorted by name by default. Named topologies place them so."""
    relays: tuple[SiteName, ...] = ()
    """Members to connect to besides neighbours: they pass on what cannot travel directly (two sites behind NAT)."""
    relay: bool = True
    """Whether this site passes checkpoints on between two members that cannot connect and ask it to."""
    revoked: tuple[SiteName, ...] = ()
    """Members whose key this site no longer trusts: refused, and nobody waits for them. Can change while the node runs."""
    max_frame_bytes: PositiveInt = 4 << 30
    """Refuse a teacher's checkpoint that is larger than this on the wire."""
    max_upload_mbit: PositiveFloat | None = None
    """Send at most so many megabits a second to all peers together, shared fairly; none: as much as the links take."""
    linger_s: NonNegativeFloat = 600.0
    """How long a finished site serves its last checkpoint to neighbours that have not finished."""
    group: GroupConfig = GroupConfig()
    task: LanguageModelConfig = LanguageModelConfig()
    training: TrainingConfig = TrainingConfig()
    codistillation: CodistillationConfig = CodistillationConfig()
    frames: FramesConfig = FramesConfig()

    @property
    def ordered_members(self) -> tuple[str, ...]:
        """The members, this site included, in the order that all nodes agree on. Raises ConfigError."""
        names = [peer.name for peer in self.peers]
        if self.name in names:
            raise ConfigError(f"the peer {self.name!r} has this site's own name: peers are the other members")
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"the peer {name!r} is listed twice")
        for name in self.relays:
            if name not in names:
                raise ConfigError(
                    f"the relay {name!r} is none of this site's peers: {', '.join(names) or 'none'}"
                )
        for name in self.revoked:
            if name not in names:
                raise ConfigError(
                    f"the revoked member {name!r} is none of this site's peers: {', '.join(names) or 'none'}"
                )
        everyone = sorted([self.name, *names])
        if self.members and sorted(self.members) != everyone:
            raise ConfigError(
                f"members ({', '.join(self.members)}) must list this site and its peers ({', '.join(everyone)}), each once"
            )
        return self.members or tuple(everyone)


class GroupSpec(StrictModel):
    """What a node tells its ranks: one JSON file, named by the environment variable `P2PCODISTILL_GROUP`."""

    site: str
    link_address: str
    """`ipc://` address of the link between rank 0 and the node."""
    link_token: str
    """Tells this launch of the group from earlier ones."""
    outbox_folder: Path
    """Where rank 0 puts encoded frames for the node to take."""
    training_folder: Path
    """Where the ranks keep their training checkpoints."""
    model_path: Path
    """Where the reference loop writes the final model (safetensors)."""
    error_path: Path
    """Where a rank writes the one line about what only the user can mend, before it gives up."""
    teachers: Annotated[tuple[dict[str, float], ...], Field(min_length=1)]
    """The weights of this site's teachers: one table for each exchange of this site, used in turn; a single one for a graph
    that stays."""
    num_students: NonNegativeInt
    """How many sites learn from this one; with none, nothing is published."""
    shard_index: NonNegativeInt
    num_shards: PositiveInt
    """This site's share of text that all sites have (used when `task.data` is empty)."""
    group: GroupConfig
    task: LanguageModelConfig
    training: TrainingConfig
    codistillation: CodistillationConfig
    frames: FramesConfig


GROUP_SPEC_VARIABLE = "P2PCODISTILL_GROUP"

Model = TypeVar("Model", bound=StrictModel)


def load_toml(path: Path) -> dict[str, Any]:
    """The table in the TOML file `path`. Raises ConfigError that names the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_FILE_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_CONFIG_FILE_BYTES >> 20} MiB: not a configuration file"
        )
    try:
        return _parse_toml(raw.decode(), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _parse_toml(text: str, *, source: str) -> dict[str, Any]:
    """Raises TOMLDecodeError, and ConfigError for TOML beyond what Python's parser can take."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise _excessive(source, error) from None


def _excessive(source: str, error: RecursionError | ValueError) -> ConfigError:
    match error:
        case RecursionError():
            why = "its values are nested too deeply"
        case UnicodeEncodeError():
            why = "it is not Unicode text"
        case _:  # of Python's own limit on converting between text and integers
            why = "it holds a number with too many digits"
    return ConfigError(f"{source}: {why}")


def parse_model(model: type[Model], table: Mapping[str, Any], *, source: str) -> Model:
    """`table` as a `model`. Raises ConfigError: one line that names `source`, the key and what to write instead."""
    try:
        document = json.dumps(table, default=str, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:
        raise _excessive(source, error) from None
    try:
        # Through JSON, so that strict mode takes arrays for tuples and strings for paths, and nothing else.
        return model.model_validate_json(document)
    except ValidationError as error:
        # A misspelt key is also a missing one: name the misspelling.
        first, *others = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        if first["type"] == "json_invalid":  # it is valid, but pydantic takes fewer levels than `json`
            raise _excessive(source, RecursionError()) from None
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{source}: {_describe(model, first)}{more}") from None
    except UserError as error:
        raise ConfigError(f"{source}: {error}") from None


def _describe(model: type[StrictModel], error: Any) -> str:
    location = tuple(error["loc"])
    key = ".".join(str(part) for part in location)
    if error["type"] == "extra_forbidden":
        valid = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(valid)}"
        return f"unknown key {key!r}: {hint}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    # This package's own messages show what was given where that helps.
    is_shown = isinstance(given, str | int | float | bool) and error["type"] != "user_error"
    shown = f", got {_shorten(repr(given))}" if is_shown else ""
    return f"{key}: {message[:1].lower()}{message[1:]}{shown}"


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The valid keys of the (possibly nested) model that `location` leads to."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and part in getattr(current, "model_fields", {}):
            current = _model_in(current.model_fields[part].annotation)
    return list(getattr(current, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        found = _model_in(argument)
        if found is not None:
            return found
    return None


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`table` with each `dotted.key=value` of the command line's `--set` applied; values are TOML, else plain text.

    `table` stays as it is, and the result shares with it what is the same. Raises ConfigError for an assignment that has
    no `=`, that leads into something that is not a table or whose value is beyond what a configuration can hold.
    """
    result = dict(table)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes KEY=VALUE, got {assignment!r}")
        try:
            value = _parse_toml(f"value = {text}", source=f"--set {key.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, last = key.strip().split(".")
        current = result
        for parent in parents:
            inner = current.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {key}: {parent!r} is not a table")
            current[parent] = dict(inner)
            current = current[parent]
        current[last] = value
    return result


def parse_peer(text: str) -> PeerConfig:
    """A peer of the command line, `NAME=tcp://HOST:PORT#PUBLIC-IDENTITY` (no address: `NAME=#PUBLIC-IDENTITY`).

    Raises ConfigError or IdentityError.
    """
    name, equals, rest = text.partition("=")
    address, hash_sign, identity = rest.rpartition("#")
    if not equals or not hash_sign:
        raise ConfigError(
            f"--peers {text!r}: write NAME=tcp://HOST:PORT#PUBLIC-IDENTITY, in quotes where the shell treats # specially"
        )
    check_site_name(name)
    try:
        PublicIdentity.parse(identity)
    except IdentityError as error:
        raise ConfigError(f"--peers {name}: {error}") from None
    table = {"name": name, "public_identity": identity, "address": address or None}
    return parse_model(PeerConfig, table, source=f"--peers {name}")
