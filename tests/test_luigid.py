"""Several workers on one scheduler: a real luigid on loopback, and what its page shows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from luigi.scheduler import Scheduler

from pipeline import tasks
from pipeline.cli import status
from tests.conftest import ROOT, write_few_card
from tests.pipeline.test_stage import config  # noqa: F401 - a fixture


def test_stages_with_a_model_take_what_the_configuration_says(config):
    assert tasks.Propose().resources == {"gpu": 1}
    assert tasks.Train().resources == tasks.BasePolicy().resources == tasks.Evaluate().resources
    assert tasks.Split().resources == tasks.BuildMCQ().resources == {}
    config.set("run", "model_resources", '{"gpu": 2, "ssd": 1}')
    assert tasks.Propose().resources == {"gpu": 2, "ssd": 1}


def test_two_stages_with_a_model_do_not_run_at_once(config):
    scheduler = Scheduler()
    for worker, stage in (("one", tasks.Propose()), ("other", tasks.BasePolicy())):
        scheduler.add_task(worker=worker, task_id=worker, resources=stage.resources)
    assert scheduler.get_work(worker="one")["task_id"] == "one"
    assert scheduler.get_work(worker="other")["task_id"] is None
    scheduler.add_task(worker="one", task_id="one", status="DONE")
    assert scheduler.get_work(worker="other")["task_id"] == "other"


@pytest.fixture
def luigid(tmp_path):
    """A scheduler of its own on loopback; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from luigi.cmdline import luigid; luigid()"]
    command += ["--port", str(port), "--address", "127.0.0.1"]
    command += ["--state-path", str(tmp_path / "state"), "--logdir", str(tmp_path)]
    with (tmp_path / "luigid.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
        while True:
            assert process.poll() is None, (tmp_path / "luigid.log").read_text()
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            time.sleep(0.05)
        yield port
        process.send_signal(signal.SIGTERM)
        process.wait()


def ask(port: int, what: str, **arguments) -> dict:
    query = urllib.parse.urlencode({"data": json.dumps(arguments)})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/{what}?{query}") as answer:
        return json.load(answer)["response"]


@pytest.mark.process
def test_two_workers_share_a_graph_and_run_every_stage_once(luigid, tmp_path):
    write_few_card(tmp_path / "cards")
    (tmp_path / "cards" / "more.md").write_text((tmp_path / "cards" / "few.md").read_text())
    text = (ROOT / "luigi.cfg").read_text()
    shared = f"local_scheduler = false\nscheduler_port = {luigid}\n"
    assert "local_scheduler = true\n" in text
    text = text.replace("local_scheduler = true\n", shared)
    (tmp_path / "luigi.cfg").write_text(text)
    command = [sys.executable, "-m", "luigi", "--module", "pipeline.tasks", "Split"]
    command += ["--dataset", "few+more", "--worker-keep-alive", "--worker-wait-interval", "0.2"]
    workers = [
        subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]  # fmt: skip
    told = [worker.communicate(timeout=120)[0] for worker in workers]
    assert {worker.returncode for worker in workers} <= {0, 25}, told  # 25: the other did the rest
    logs = [folder / "run.log" for folder in status.artifacts(tmp_path / "artifacts")]
    assert len(logs) == 4, "Download and Split of two sets"
    assert all(path.read_text().count("--- ") == 1 for path in logs), "each was begun once"
    assert sum(text.count(" running   ") for text in told) >= 4

    done = ask(luigid, "task_list", status="DONE", upstream_status="")
    downloads = {key: row for key, row in done.items() if key.startswith("Download")}
    assert len(downloads) == 2
    for key, row in downloads.items():
        folder = Path(urllib.parse.urlparse(row["tracking_url"]).path)
        assert (folder / "manifest.json").exists(), "the link leads to the artifact"
        message = ask(luigid, "get_task_status_message", task_id=key)["statusMessage"]
        assert message.startswith("download: ")
        assert message.endswith(" of 320 images")
        assert ask(luigid, "get_task_progress_percentage", task_id=key)["progressPercentage"] >= 0
