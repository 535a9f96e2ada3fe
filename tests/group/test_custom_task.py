"""A task of the user's own: the README's example trains as printed, and what is no task is refused in one line."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2pcodistill.config import GroupSpec
from p2pcodistill.errors import ConfigError
from p2pcodistill.group.task import load_task
from p2pcodistill.group.train import train
from p2pcodistill.strict import parse_model
from p2pcodistill.task_configs import CustomTaskConfig
from p2pcodistill.telemetry.training_events import Evaluated, TrainingEnded

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = README.split("## A task of your own", 1)[1].split("\n## ", 1)[0]
CODE = SECTION.split("```python\n", 1)[1].split("```", 1)[0]
TABLE = SECTION.split("```toml\n", 1)[1].split("```", 1)[0]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Python finds modules, as it does in the folder of the command."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rings", raising=False)
    return tmp_path


def with_task(spec: GroupSpec, task: CustomTaskConfig) -> GroupSpec:
    return spec.model_copy(update={"task": task})


def test_the_readmes_example_trains_as_printed(
    spec: GroupSpec, launch: Callable[[GroupSpec], Path], stub_node, folder: Path
) -> None:
    (folder / "rings.py").write_text(CODE)
    task = parse_model(CustomTaskConfig, tomllib.loads(TABLE)["task"], source="README.md")
    training = spec.training.model_copy(
        update={"num_steps": 60, "batch_size": 64, "learning_rate": 1e-2, "evaluation_interval_steps": 30}
    )
    spec = with_task(spec, task).model_copy(update={"training": training})
    launch(spec)
    train(spec)
    stub_node.wait_for_event(TrainingEnded)
    evaluated = [event for event in stub_node.events if isinstance(event, Evaluated)]
    assert [event.step for event in evaluated] == [30, 60]
    assert evaluated[-1].val_loss < 0.5 and evaluated[-1].metrics["accuracy"] > 0.9
    own = load_task(spec, rank=0, num_ranks=1, device=CPU)
    predictions = own.predict(own.make_model())
    assert predictions.probabilities_NC.shape == (len(predictions.labels_N), 2)
    torch.testing.assert_close(predictions.probabilities_NC.sum(1), torch.ones(len(predictions.labels_N)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class Rings:", "class Other:", "'rings' has no 'Rings'"),
        ("class Rings:", "Rings = 3\nclass Other:", "'Rings' is no class"),
        ("def evaluate(", "def assess(", r"'Rings' has no method evaluate\(self, model\)"),
        ("def load_state_dict(", "def load(", "'Rings' has no method load_state_dict"),
        (
            "def forward(self, model, inputs, state)",
            "def forward(self, model)",
            r"'Rings.forward' does not take \(self, model, inputs, state\)",
        ),
        ("*, rank, num_ranks, device", "rank", r"'Rings' does not take \(spec, \*, rank"),
        (
            "import torch\n",
            "import torch\ntorch.no_such_thing\n",
            r"cannot be imported \(AttributeError: .*no_such_thing",
        ),
        (
            "import torch\n",
            "import torch\nraise ValueError('two\\nlines')\n",
            r"\(ValueError: two\): mend it",
        ),
        ("import torch\n", "import torch\n1 +\n", r"cannot be imported \(SyntaxError: invalid syntax"),
        ("import torch\n", "import torch_that_is_missing\n", "No module named 'torch_that_is_missing'"),
    ],
)
def test_what_is_no_task_is_one_line(spec: GroupSpec, folder: Path, old: str, new: str, message: str) -> None:
    assert old in CODE
    (folder / "rings.py").write_text(CODE.replace(old, new, 1))
    spec = with_task(spec, CustomTaskConfig(name="custom", task="rings:Rings", options={"noise": 0.1}))
    with pytest.raises(ConfigError, match=message) as refusal:
        load_task(spec, rank=0, num_ranks=1, device=CPU)
    assert str(refusal.value).startswith("task.task 'rings:Rings': ") and "\n" not in str(refusal.value)


def test_a_module_that_is_not_there_says_where_to_put_it(spec: GroupSpec) -> None:
    spec = with_task(spec, CustomTaskConfig(name="custom", task="nowhere.tasks:Task"))
    with pytest.raises(ConfigError, match=r"cannot import 'nowhere.tasks' .*start the node in its folder"):
        load_task(spec, rank=0, num_ranks=1, device=CPU)


@pytest.mark.parametrize("task", ["rings", "rings:", ":Rings", "rings.Rings", ".rings:Rings", "a b:C", ""])
def test_a_name_that_names_no_class_is_refused_in_the_file(task: str) -> None:
    with pytest.raises(ConfigError, match=r"names no class: write package\.module:Class"):
        parse_model(CustomTaskConfig, {"name": "custom", "task": task}, source="site.toml")
