"""Paths that users write: the home folder, and addresses that are none."""

import pytest

from research.config.config_file import load_config_file
from research.core.errors import UserError
from research.core.local_paths import local_path
from research.data.instructions.row_files import row_files
from research.plan.plan_json import check_json
from research.runs.run_directory import RunDir


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b.jsonl").write_text("")
    assert local_path("~/x") == tmp_path / "x"
    assert (
        row_files("~/a b.jsonl") == row_files("~/*.jsonl") == [tmp_path / "a b.jsonl"]
    )
    check_json("~/plan.json")
    (tmp_path / "c.py").write_text(
        "from research.config import defaults\ndef get_config():\n"
        "    config = defaults()\n    config.steps = 7\n    return config\n"
    )
    assert load_config_file("~/c.py").steps == 7


@pytest.mark.parametrize("written", ["gs://bucket/run", "s3://b/x", "https://h/x"])
def test_an_address_where_a_folder_is_needed_is_refused(written):
    for use in (RunDir, local_path, row_files, check_json):
        with pytest.raises(UserError, match=f"{written}, an address .*mount"):
            use(written)
