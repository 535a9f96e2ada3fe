"""Run folders: one node at a time, one configuration, nothing lost."""

import errno

import pytest

from p2pcodistill.errors import RunFolderError
from p2pcodistill.runfolder import RunFolder, is_full_disk

DESCRIPTION = {"run": "pair", "training": {"num_steps": 2000}}


def test_reopened_by_the_same_configuration(tmp_path):
    RunFolder(tmp_path / "run", DESCRIPTION).close()
    again = RunFolder(tmp_path / "run", DESCRIPTION)
    assert again.training.is_dir()
    again.close()


def test_another_configuration_is_refused_by_its_first_differing_key(tmp_path):
    RunFolder(tmp_path / "run", DESCRIPTION).close()
    with pytest.raises(RunFolderError, match=r"training\.num_steps was 2000 and is now 10"):
        RunFolder(tmp_path / "run", {"run": "pair", "training": {"num_steps": 10}})
    with pytest.raises(RunFolderError, match=r"topology was None and is now 'ring'"):
        RunFolder(tmp_path / "run", DESCRIPTION | {"topology": "ring"})
    RunFolder(tmp_path / "run", DESCRIPTION).close()


def test_a_second_node_is_kept_out(tmp_path):
    first = RunFolder(tmp_path / "run", DESCRIPTION)
    with pytest.raises(RunFolderError, match="another node is running"):
        RunFolder(tmp_path / "run", DESCRIPTION)
    first.close()
    RunFolder(tmp_path / "run", DESCRIPTION).close()


def test_a_damaged_description_is_not_overwritten(tmp_path):
    folder = RunFolder(tmp_path / "run", DESCRIPTION)
    folder.close()
    (folder.path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        RunFolder(tmp_path / "run", DESCRIPTION)
    assert (folder.path / "config.json").read_text() == "{"


def test_only_a_lack_of_room_is_a_full_disk():
    assert is_full_disk(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_full_disk(OSError(errno.EIO, "Input/output error"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot use the run folder"):
        RunFolder(tmp_path / "file" / "run", DESCRIPTION)
