"""A new cluster engine is one new file and one entry in the tuple of engines."""

from tests.extension.house import House

ENGINE = '''
"""A queue that takes a shell script (light)."""

from llmtune.launching.base import Engine, EngineOption, LaunchJob, script


class QueueEngine(Engine):
    """A job of one script."""

    name = "queue"
    program = "bash"
    file = "job.sh"
    shares_files = True
    options = (EngineOption("greeting", "What it says first."),)

    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the script."""
        command = job.command(str(job.config_path), python=job.python)
        return {self.file: script([f"echo {job.option('greeting')}", f"echo {command}"])}

    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return the shell with the script."""
        return [self.program, str(job.folder / self.file)]

    def notes(self, job: LaunchJob) -> list[str]:
        """Return nothing to say."""
        return []
'''


def test_a_new_engine_writes_its_file_and_is_handed_in(tmp_path):
    house = House(tmp_path / "house")
    house.add("launching/queue.py", ENGINE.lstrip())
    house.enter(
        "launching/config.py",
        {
            "from llmtune.launching.ray import": (
                "from llmtune.launching.queue import QueueEngine\nfrom llmtune.launching.ray import"
            ),
            "RayEngine())": "RayEngine(), QueueEngine())",
        },
    )
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "config.yaml").write_text(
        "{run_dir: run, model: {base: org/tiny}, data: {train: [{path: rows.jsonl}]}}"
    )
    options = ["--on", "queue", "--greeting", "hello", "--package", "installed", "--gpus", "2"]
    done = house.run("launch", "config.yaml", *options, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == "hello"
    assert "llmtune.launching.torchrun --nproc-per-node 2 --standalone -m llmtune run" in lines[1]
