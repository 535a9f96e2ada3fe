"""Configuration: strict models, one-line errors that name the key, overrides, peers on the command line."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.config import NodeConfig, TrainingConfig, parse_peer
from p2pcodistill.errors import ConfigError, UserError
from p2pcodistill.identity import Identity
from p2pcodistill.strict import MAX_CONFIG_FILE_BYTES, load_toml, override, parse_model

PUBLIC = str(Identity.from_secrets(b"s" * 32, b"c" * 32).public)


def parse(table):
    return parse_model(NodeConfig, table, source="site.toml")


def test_a_minimal_file_has_the_documented_defaults():
    config = parse({"name": "berlin"})
    assert config.topology == "pair"
    assert config.codistillation.exchange_interval_steps == 50
    assert config.codistillation.loss == "soft-cross-entropy"
    assert config.training.learning_rate_schedule == "cosine"
    assert (config.codistillation.teacher_precision, config.codistillation.teacher_average_decay) == (
        "float32",
        0,
    )
    assert (config.frames.delta, config.frames.keyframe) == ("adaptive", "fp16")


def test_order_and_initialisation_can_have_seeds_of_their_own():
    def of(site="berlin", **training):
        own = TrainingConfig(**training).of_site(site)
        assert own.order_seed is None
        return own.seed, own.seed if own.initialisation_seed is None else own.initialisation_seed

    plain, other = of(seed=1), of(seed=2)
    assert len({*plain, *other, *of("tokyo", seed=1)}) == 3
    assert of(seed=1, order_seed=2) == (other[0], plain[1]), "the start of the one, the order of the other"
    assert of(seed=1, order_seed=1) == plain
    assert of(seed=1, order_seed=2, initialisation_seed=7) == (other[0], 7)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "the key 'name' is missing"),
        ({"name": "b", "trainig": {}}, "unknown key 'trainig': did you mean 'training'"),
        (
            {"name": "b", "training": {"num_step": 3}},
            "unknown key 'training.num_step': did you mean 'num_steps'",
        ),
        ({"name": "b", "training": {"num_steps": "3"}}, "training.num_steps: .* got '3'"),
        ({"name": "b", "training": {"num_steps": 0}}, "training.num_steps: .* greater than or equal to 1"),
        ({"name": "b", "training": {"learning_rate": float("inf")}}, "training.learning_rate"),
        ({"name": "b", "codistillation": {"gate_margin": -0.5}}, "codistillation.gate_margin: .* equal to 0"),
        ({"name": "b", "codistillation": {"gate_margin": float("inf")}}, "codistillation.gate_margin"),
        ({"name": "b", "codistillation": {"max_staleness_steps": 0}}, "codistillation.max_staleness_steps"),
        ({"name": "b", "codistillation": {"max_staleness_step": 9}}, "did you mean 'max_staleness_steps'"),
        ({"name": "b", "codistillation": {"max_age_s": 0.0}}, "codistillation.max_age_s: .* greater than 0"),
        ({"name": "b", "codistillation": {"age_half_life_s": -1.0}}, "codistillation.age_half_life_s"),
        (
            {"name": "b", "codistillation": {"loss": "mse"}},
            "codistillation.loss: .*'squared-error', got 'mse'",
        ),
        (
            {"name": "b", "codistillation": {"teacher_average_decay": 1.0}},
            "teacher_average_decay: .* less than 1",
        ),
        (
            {"name": "b", "codistillation": {"teacher_precision": "int4"}},
            "teacher_precision: .*'int8', got 'int4'",
        ),
        ({"name": "b", "frames": {"delta": "2-bit"}}, "frames.delta: .*'off', got '2-bit'"),
        (
            {"name": "b", "frames": {"exchange_budget_bytes": 0}},
            "frames.exchange_budget_bytes: .* equal to 1",
        ),
        ({"name": "b", "frame": {}}, "unknown key 'frame': did you mean 'frames'"),
        (
            {"name": "b", "task": {"name": "vision"}},
            "task.name: there is no 'vision'; use one of 'language-model'",
        ),
        ({"name": "b", "peers": [{"name": "t", "publc_identity": "x"}]}, "did you mean 'public_identity'"),
        ({"name": "b/c"}, "name: 'b/c' cannot name a site"),
        ({"name": "b", "training": {"num_steps": -(10**4000)}}, r"training.num_steps: .* got -10{75}\.\.\.$"),
        ({"name": "b", "training": {"num_steps": 10**5000}}, "a number with too many digits"),
        ({"name": "\udcff"}, "not Unicode"),
        (
            {"name": "b", "peers": [{"name": "t", "public_identity": 3}]},
            r"peers\.0\.public_identity: .* got 3",
        ),
        (
            {"name": "b", "peers": [{"name": "t", "public_identity": "PASTE HERE"}]},
            r"peers\.0\.public_identity: a public identity must start with 'p2p1-', got 'PASTE HERE'$",
        ),
        (
            {"name": "b", "peers": [{"name": "t", "public_identity": PUBLIC[:-1]}]},
            r"peers\.0\.public_identity: a public identity is incomplete or mistyped.*copy it again",
        ),
    ],
)
def test_every_mistake_is_one_line_that_names_the_key(table, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(table)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("site.toml: ")


def test_members_are_sorted_by_default_and_checked_when_given():
    peers = [{"name": name, "public_identity": PUBLIC} for name in ("tokyo", "lima")]
    assert parse({"name": "oslo", "peers": peers}).ordered_members == ("lima", "oslo", "tokyo")
    chosen = parse({"name": "oslo", "peers": peers, "members": ["tokyo", "oslo", "lima"]})
    assert chosen.ordered_members == ("tokyo", "oslo", "lima")
    with pytest.raises(ConfigError, match="must list this site and its peers"):
        _ = parse({"name": "oslo", "peers": peers, "members": ["tokyo", "oslo"]}).ordered_members
    with pytest.raises(ConfigError, match="own name"):
        _ = parse({"name": "lima", "peers": peers}).ordered_members
    with pytest.raises(ConfigError, match="listed twice"):
        _ = parse({"name": "oslo", "peers": peers + peers[:1]}).ordered_members


def test_files_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("name = \n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML.*line 1"):
        load_toml(broken)
    with pytest.raises(ConfigError, match=r"no such file: .*missing\.toml"):
        load_toml(tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_toml(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.toml/below\.toml: Not a directory"):
        load_toml(broken / "below.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*: File name too long"):
        load_toml(tmp_path / ("x" * 300))
    (tmp_path / "large.toml").write_bytes(b"#" * (MAX_CONFIG_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        load_toml(tmp_path / "large.toml")


EXCESSIVE = [
    ("task=" + "1" * 5000, "a number with too many digits"),
    ("task=0x" + "f" * 5000, "a number with too many digits"),
    ("task=" + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ("task=" + "[" * 300 + "]" * 300, "nested too deeply"),
    ("task=" + "[" * 3000, "nested too deeply"),
    (".".join(["task"] * 3000) + "=1", "nested too deeply"),
]


@pytest.mark.parametrize(("assignment", "message"), EXCESSIVE)
def test_values_beyond_what_python_takes_are_one_line(tmp_path, assignment, message):
    path = tmp_path / "excessive.toml"
    path.write_text(f'name = "b"\n{assignment}\n')
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model(NodeConfig, load_toml(path), source=str(path))
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model(NodeConfig, override({"name": "b"}, [assignment]), source="site.toml")
    assert str(caught.value).startswith(("site.toml: ", "--set task: ")) and "\n" not in str(caught.value)


def test_overrides_take_toml_values_or_plain_text():
    table = {"name": "b", "training": {"num_steps": 5, "seed": 1}}
    changed = override(table, ["training.num_steps=7", "codistillation.loss=kl", 'task.data=["x"]'])
    assert changed["training"] == {"num_steps": 7, "seed": 1}
    assert changed["codistillation"] == {"loss": "kl"}
    assert changed["task"] == {"data": ["x"]}
    assert table == {"name": "b", "training": {"num_steps": 5, "seed": 1}}


@pytest.mark.parametrize(
    ("assignment", "message"), [("num_steps", "KEY=VALUE"), ("name.x=1", "'name' is not a table")]
)
def test_overrides_that_make_no_sense(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override({"name": "b"}, [assignment])


def test_peers_of_the_command_line():
    peer = parse_peer(f"tokyo=tcp://tokyo.example:5600#{PUBLIC}")
    assert (peer.name, peer.address) == ("tokyo", "tcp://tokyo.example:5600")
    assert str(peer.identity) == PUBLIC
    assert parse_peer(f"tokyo=#{PUBLIC}").address is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokyo", "write NAME=tcp"),
        ("to/kyo=#x", "'to/kyo' cannot name a site"),
        ("tokyo=#x", "--peers tokyo: a public identity must start with"),
        (f"tokyo=\udcff#{PUBLIC}", "--peers tokyo: it is not Unicode text"),
    ],
)
def test_peers_that_make_no_sense(text, message):
    with pytest.raises(UserError, match=message):
        parse_peer(text)


@given(st.text(max_size=120))
def test_arbitrary_peers_are_refused_by_a_user_error(text):
    with pytest.raises(UserError):
        parse_peer(text)
