"""The models of a node: `NodeConfig` is a site's file (`nodes/`), `GroupSpec` what a node writes for its ranks.

The scenario file's model, which embeds these, is in `simulation/scenario.py`. One file describes a run completely. Fields
carry their unit in their name; each is documented here and in the README.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from p2pcodistill.errors import ConfigError, IdentityError
from p2pcodistill.identity import PublicIdentity, check_site_name
from p2pcodistill.strict import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SiteName,
    StrictModel,
    accepted_by,
    parse_model,
)
from p2pcodistill.task_configs import LanguageModelConfig, TaskConfig


class CodistillationConfig(StrictModel):
    """When and how the student learns from its teachers (Anil et al. 2018, Algorithm 1)."""

    burn_in_steps: NonNegativeInt = 200
    """Steps before any distillation: early teachers are harmful, and models should stay diverse."""
    ramp_steps: NonNegativeInt = 0
    """Steps over which the weight grows linearly from 0 after burn-in; 0 switches it on at once, as in the paper."""
    exchange_interval_steps: PositiveInt = 50
    """Steps between two published snapshots; the first is at the end of burn-in, whatever the interval."""
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
    optimizer: Literal["adam", "sgd", "adagrad"] = "adam"
    """What makes updates of gradients."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of `sgd`: the share of the last update that goes on in the next one."""
    nesterov: bool = False
    """Of `sgd` with momentum: look ahead along it (Nesterov)."""
    learning_rate: PositiveFloat = 2e-3
    """Peak rate of the optimizer."""
    reference_batch_size: PositiveInt | None = None
    """Linear scaling (Goyal et al. 2017): `learning_rate` is for so many examples a step, and grows with those of all."""
    learning_rate_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """`cosine` and `linear` decay to zero over the run (a constant rate flatters codistillation)."""
    learning_rate_drops: tuple[tuple[PositiveInt, PositiveFloat], ...] = ()
    """`[[step, factor], ...]`: from each such step on, the rate is multiplied by the factor, on top of the schedule."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate first grows linearly: from 0, or under the scaling rule from `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    """Pull of the weights towards zero, as a part of the gradient; for `adam` decoupled from it (AdamW)."""
    weight_decay_changes: tuple[tuple[PositiveInt, NonNegativeFloat], ...] = ()
    """`[[step, value], ...]`: the weight decay from each such step on (Sodhani et al. 2020: 1e-4, then 1e-5, then 0)."""
    decay_norms_and_biases: bool = True
    """Whether weight decay is for tensors of one dimension, too: biases and scales of norms (Goyal et al. 2017: false)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target distribution that is taken from the label; 0: none."""
    label_smoothing_prior: Literal["uniform", "unigram"] = "uniform"
    """Where that share goes: to all classes alike, or by how often each was the label so far."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Evaluate and keep a moving average of the weights with this decay a step (0.99: of 100 steps); 0: the last weights."""
    max_gradient_norm: NonNegativeFloat = 1.0
    """Clip the global norm of the gradient to this; 0 does not clip."""
    seed: NonNegativeInt = 0
    """Seeds initialisation and example order, together with the site's name: sites differ under one seed."""
    initialisation_seed: NonNegativeInt | None = None
    """Seeds initialisation alone: sites that share it start from the same model; none: `seed` does."""
    order_seed: NonNegativeInt | None = None
    """Seeds example order alone, with the site's name, so that retrains differ in initialisation only; none: `seed` does."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast of forward passes. `auto`: bfloat16 where the processor computes it natively, else float32."""
    evaluation_interval_steps: PositiveInt = 50
    """Steps between two evaluations on held-out data."""
    checkpoint_interval_steps: PositiveInt = 250
    """Steps between two training checkpoints, from which a restarted group goes on."""
    report_interval_steps: PositiveInt = 10
    """Steps between two `step-measured` events."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optimizer != "sgd" and (self.momentum or self.nesterov):
            raise ConfigError(f'momentum and nesterov are for optimizer = "sgd", not {self.optimizer!r}')
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov looks ahead along the momentum: set momentum, or remove nesterov")
        for key in ("learning_rate_drops", "weight_decay_changes"):
            steps = [step for step, _ in getattr(self, key)]
            if steps != sorted(set(steps)):
                raise ConfigError(f"{key} come in the order of their steps, each once: these are at {steps}")
        return self

    def of_site(self, name: str) -> TrainingConfig:
        """The same for one site: its seeds are made of the run's and of the site's name, where sites do not share one.

        Codistillation needs sites that start from different models (Anil et al. 2018, section 2).
        """
        if self.order_seed is None:
            return self.model_copy(update={"seed": _site_seed(self.seed, name)})
        # Tasks know one seed, that of the order.
        update = {"seed": _site_seed(self.order_seed, name), "order_seed": None}
        if self.initialisation_seed is None:
            update["initialisation_seed"] = _site_seed(self.seed, name)
        return self.model_copy(update=update)


def _site_seed(seed: int, name: str) -> int:
    text = f"p2pcodistill-seed/{seed}/{name}"
    # 31 bits; hashed, because ranks count up from it.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


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
    public_identity: Annotated[str, accepted_by(PublicIdentity.parse)]
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
    """Whether this site fetches checkpoints for two members that cannot connect and ask it to."""
    revoked: tuple[SiteName, ...] = ()
    """Members whose key this site no longer trusts: refused, and nobody waits for them. Can change while the node runs."""
    max_frame_bytes: PositiveInt = 4 << 30
    """Refuse a teacher's checkpoint that is larger than this on the wire."""
    max_upload_mbit: PositiveFloat | None = None
    """Send at most so many megabits a second to all peers together, shared fairly; none: as much as the links take."""
    linger_s: NonNegativeFloat = 600.0
    """How long a finished site serves its last checkpoint to neighbours that have not finished."""
    group: GroupConfig = GroupConfig()
    task: TaskConfig = LanguageModelConfig()
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
    group: GroupConfig
    task: TaskConfig
    training: TrainingConfig
    codistillation: CodistillationConfig
    frames: FramesConfig


GROUP_SPEC_VARIABLE = "P2PCODISTILL_GROUP"


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
