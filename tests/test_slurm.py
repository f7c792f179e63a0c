"""Studies on a SLURM cluster: the commands, the batch scripts alone, and a real cluster."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import OPTIONS, ROOT, Story, Unavailable, disturbed, running

from expertdiff.cli import main
from expertdiff.cluster import SCRIPTS, Queued, _ranges, queue
from expertdiff.files import write_json
from expertdiff.status import rows_of

TOY = ["--config", str(ROOT / "configs/toys/mdm.yaml"), *OPTIONS]


def program(folder: Path, name: str, script: str) -> None:
    """A program of this name in a folder of the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


class TestCommands:
    """What is submitted; no cluster."""

    @pytest.fixture
    def launch(self, tmp_path, capsys):
        def run(*options: str) -> tuple[int, str]:
            code = main(["launch", *TOY, f"--study.root={tmp_path}", "--study.name=s", *options])
            captured = capsys.readouterr()
            return code, captured.out if code == 0 else captured.err.strip().splitlines()[-1]

        return run

    @pytest.fixture
    def slurm(self, tmp_path, monkeypatch):
        """Programs that answer as SLURM's would; returns the commands that sbatch was given."""
        bin = tmp_path / "bin"
        program(bin, "sbatch", f'echo "$*" >>{tmp_path}/sbatch; wc -l <{tmp_path}/sbatch')
        program(bin, "squeue", "true")
        program(bin, "scancel", f'echo "$*" >{tmp_path}/scancel')
        monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        return lambda: (tmp_path / "sbatch").read_text().splitlines()

    def test_dry_run_writes_nothing(self, launch, tmp_path):
        code, out = launch("--slurm", "--dry-run", "--parallel=2")
        train, evaluate = out.splitlines()
        assert code == 0 and not list(tmp_path.iterdir())
        assert "--array=0-3%2 " in train and f"{SCRIPTS}/experts.sbatch" in train
        assert train.endswith(f"site.sh {tmp_path}/s 4")
        assert "--dependency=afterok:<experts 1>" in evaluate and "evaluate.sbatch" in evaluate

    def test_experts_wait_for_what_they_share(self, launch, slurm, tmp_path):
        code, out = launch("--slurm", "--study.shared=60")
        first, baseline, parts, evaluate = slurm()
        assert code == 0
        assert (tmp_path / "s/jobs.txt").read_text().split() == [
            "expert-0", "expert-1", "expert-2", "shared", "baseline",
        ]  # fmt: skip
        assert "--array=3 " in first and "--dependency" not in first
        assert "--array=4 " in baseline and "--dependency" not in baseline
        assert "--array=0-2 " in parts and "--dependency=afterok:1 " in parts
        assert "--dependency=afterok:1:2:3 " in evaluate
        assert "submitted 3: expert-0, expert-1, expert-2" in out

    def test_a_limit_holds_for_all_that_may_run_at_once(self, launch, slurm):
        launch("--slurm", "--study.shared=60", "--parallel=2")
        first, rest, _ = slurm()
        assert "--array=3%2 " in first
        assert "--array=0-2,4%2 " in rest and "--dependency=afterok:1 " in rest

    def test_all_or_nothing(self, launch, slurm, tmp_path):
        lines = f"{tmp_path}/sbatch"
        refusal = '[[ "$*" != *evaluate.sbatch* ]] || { echo "no such partition" >&2; exit 1; }'
        program(tmp_path / "bin", "sbatch", f'{refusal}; echo "$*" >>{lines}; echo "7;cluster"')
        code, error = launch("--slurm")
        assert code == 2 and "no such partition" in error
        assert (tmp_path / "scancel").read_text() == "7\n"

    def test_refused_while_in_the_queue(self, launch, slurm, tmp_path):
        comment = f"expertdiff:{tmp_path}/s"
        answer = tmp_path / "answer"
        answer.write_text(f"7_2|2|PENDING|Priority|{comment}\n8|N/A|RUNNING|None|another's\n")
        program(tmp_path / "bin", "squeue", f"cat {answer}")
        assert queue(tmp_path / "s") == [Queued("7_2", 2, "pending", "Priority")]
        code, error = launch("--slurm")
        assert code == 2 and "1 jobs in the queue" in error and "scancel 7_2" in error

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--dry-run"], "give both"),
            (["--slurm=nowhere.sh"], "nowhere.sh does not exist"),
            (["--slurm", "--dry-run", "--study.budget=Adaptive"], "decided in rounds"),
        ],
    )
    def test_refusals(self, launch, options, words, tmp_path):
        if "Adaptive" in options[-1]:
            options.append("--model.lr_scheduler=null")
        code, error = launch(*options)
        assert code == 2 and words in error and not list(tmp_path.iterdir())

    def test_without_slurm(self, launch, monkeypatch, tmp_path):
        program(tmp_path / "bin", "bash", "true")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        code, error = launch("--slurm")
        assert code == 2 and "there is no sbatch here" in error

    def test_ranges(self):
        assert _ranges([0]) == "0" and _ranges([3, 1, 0, 5, 6]) == "0-1,3,5-6"


class TestBatchScript:
    """experts.sbatch as bash runs it, with a program in the place of `expertdiff`."""

    @pytest.fixture
    def task(self, tmp_path):
        study = tmp_path / "study"
        (study / "b/checkpoints").mkdir(parents=True)
        (study / "jobs.txt").write_text("a\nb\n")
        program(tmp_path / "bin", "scontrol", f'echo "$*" >>{tmp_path}/scontrol')
        (tmp_path / "site.sh").write_text("setup() { :; }\n")

        def start(expertdiff: str = "exit 0", **variables: str) -> subprocess.Popen:
            program(tmp_path / "bin", "expertdiff", expertdiff)
            environment = {
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "HERE": str(tmp_path),
                "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7",
                "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2",
            }  # fmt: skip
            environment |= variables
            return subprocess.Popen(
                ["bash", SCRIPTS / "experts.sbatch", tmp_path / "site.sh", study],
                env={key: value for key, value in environment.items() if value != "none"},
                stderr=subprocess.PIPE,
                text=True,
            )

        return start

    @pytest.mark.parametrize(
        "variables, words",
        [
            ({"SLURM_ARRAY_TASK_ID": "none"}, "SLURM_ARRAY_TASK_ID is missing, but"),
            ({"SLURM_ARRAY_TASK_ID": "2"}, "array index 2, but"),
            ({"SLURM_ARRAY_TASK_COUNT": "5"}, "an array of 5 tasks for 2 jobs"),
        ],
    )
    def test_arrays_of_another_size(self, task, variables, words, tmp_path):
        process = task("touch $HERE/started", **variables)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 2 and words in error
        assert "2 jobs" in error and "--array=0-1" in error
        assert not (tmp_path / "started").exists()

    LISTENS = """trap 'exit 75' USR1 TERM; touch $HERE/ready
    while :; do sleep 0.05; done"""

    @pytest.mark.parametrize(
        "signals, requeued",
        [
            (["USR1"], True),  # time limit
            (["USR1", "USR1"], True),
            (["TERM"], False),  # preemption or scancel
            (["TERM", "USR1"], False),
            ([], False),
        ],
    )
    def test_only_a_time_limit_requeues(self, task, signals, requeued, tmp_path):
        process = task(self.LISTENS if signals else "exit 75")
        while signals and not (tmp_path / "ready").exists():
            time.sleep(0.02)
        for name in signals:
            process.send_signal(signal.Signals[f"SIG{name}"])
        process.communicate(timeout=60)
        assert process.returncode == 75
        asked = tmp_path / "scontrol"
        assert asked.exists() == requeued
        if requeued:  # the task, never the number that stands for the whole array
            assert asked.read_text() == "requeue 7_1\n"

    def test_other_failures_under_a_time_limit_end(self, task, tmp_path):
        process = task(self.LISTENS.replace("75", "70"))
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        process.communicate(timeout=60)
        assert process.returncode == 70 and not (tmp_path / "scontrol").exists()

    def test_killed_starts_again_while_it_gets_on(self, task, tmp_path):
        script = """echo . >>$HERE/count; n=$(wc -l <$HERE/count)
        [ $n -gt 6 ] || touch $HERE/study/b/checkpoints/step-0000000$n.ckpt
        kill -KILL $$"""
        process = task(script)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1 and "b made no progress in 3 restarts" in error
        # six with a new checkpoint, and after the last of them four without
        assert len((tmp_path / "count").read_text().split()) == 6 + 4

    def test_requeues_without_progress_end(self, task, tmp_path):
        for k in range(5):
            process = task("echo . >>$HERE/count; exit 75", SLURM_RESTART_COUNT=str(k))
            process.communicate(timeout=60)
            assert process.returncode == (75 if k < 4 else 1)
        assert len((tmp_path / "count").read_text().split()) == 4

    def test_evaluation_of_unfinished_jobs_is_refused(self, task, tmp_path):
        (tmp_path / "study/b/done.json").write_text("{}")
        command = ["bash", SCRIPTS / "evaluate.sbatch", tmp_path / "site.sh", tmp_path / "study"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and "a of" in done.stderr and "not trained" in done.stderr


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "many"
    names = [f"expert-{k}" for k in range(200)]
    jobs = {name: {"interval": [0, 1], "iterations": 1000} for name in names}
    write_json(folder / "study.json", {"jobs": jobs})
    (folder / "jobs.txt").write_text("\n".join(names))
    lines = [
        json.dumps({"step": step, "train/loss": 1 / step, "steps_per_second": 4.0})
        for step in range(1, 501)
    ]
    for name in names[:-1]:
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_json(folder / "expert-0/done.json", {"step": 1000})
    return folder


class TestStatus:
    """Of a study of 200 jobs."""

    def test_within_a_second(self, many):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "expertdiff", "status", many],
            capture_output=True,
            text=True,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time, as the machine may be busy with other tests.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
        assert "torch" not in done.stderr and "lightning" not in done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 201
        assert lines[1].split() == ["expert-0", "done", "1,000", "of", "1,000", "4.0", "0.0020"]
        assert lines[2].split()[-6:] == ["500", "of", "1,000", "4.0", "0.0020", "0:02:05"]
        assert "not started" in lines[200]

    def test_states_of_the_queue(self, many):
        waiting = [
            Queued("7_1", 1, "running", "None"),
            Queued("7_2", 2, "pending", "BeginTime"),
            Queued("8", None, "pending", "Dependency"),
        ]
        rows = rows_of(many, waiting)
        assert [row.state for row in rows[:3]] == ["done", "running 7_1", "pending 7_2 (BeginTime)"]
        assert rows[1].going and not rows[2].going

    @pytest.mark.parametrize(
        "line, why",
        [
            ("expertdiff: error: the disk is full", "the disk is full"),
            ("torch.OutOfMemoryError: CUDA out of memory.", "torch.OutOfMemoryError: CUDA out of"),
        ],
    )
    def test_a_failure_is_told(self, many, line, why, capsys):
        log = many / "expert-3/log.txt"
        log.write_text(f"Seed set to 0\n{line}\n")
        assert main(["status", str(many)]) == 0
        out = capsys.readouterr().out
        log.unlink()
        assert f"expert-3 failed: {why}" in out
        assert out.splitlines()[4].split()[:2] == ["expert-3", "failed"]

    def test_no_study(self, tmp_path, capsys):
        assert main(["status", str(tmp_path)]) == 2
        assert "holds no study.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster():
    try:
        with running() as started:
            yield started
    except Unavailable as reason:
        if "EXPERTDIFF_SLURM" in os.environ:
            raise
        pytest.skip(f"there is no SLURM here: {reason}")


@pytest.mark.slurm
class TestCluster:
    """The shipped scripts on a real cluster."""

    def test_disturbed_study_is_bit_equal(self, cluster, tmp_path, capsys):
        log = disturbed(cluster, tmp_path / "cluster")
        ends = [line for line in log if ": PREEMPTED, then COMPLETED" in line]
        assert len(ends) == 2, log
        assert sum("expert" in line and " running " in line for line in log) == 3
        jobs = (tmp_path / "cluster/jobs.txt").read_text().split()
        for name in jobs:  # the same jobs here, undisturbed
            config = tmp_path / "cluster" / name / "job.yaml"
            where = [f"--study.root={tmp_path}", "--study.name=local"]
            assert main(["fit", "--config", str(config), *where]) == 0
        local = [str(tmp_path / "local" / name) for name in jobs]
        assert main(["stitch", *local[:3], f"--output={tmp_path / 'stitched'}"]) == 0
        assert main(["stitch", local[3], f"--output={tmp_path / 'baseline'}"]) == 0
        for bundle in ("stitched", "baseline"):
            theirs = sorted((tmp_path / "cluster/bundles" / bundle).glob("*.safetensors"))
            ours = sorted((tmp_path / bundle).glob("*.safetensors"))
            assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs] and ours
        # Nothing is left to do.
        Story(cluster, tmp_path / "cluster").submit()
        assert not cluster.queue()

    def test_time_limit_cancel_and_failure(self, cluster, tmp_path):
        story = Story(cluster, tmp_path / "study")
        (tmp_path / "study/expert-0").mkdir(parents=True)
        (tmp_path / "study/expert-0/checkpoints").write_text("in the way")
        options = [
            "--study.baseline=false",
            "--study.iterations=1000000",
            "--study.budget=[20,20,999960]",
        ]
        array, evaluation = story.submit(*options)
        long = f"{array}_2"
        log = tmp_path / f"study/slurm/{long}.log"
        cluster.wait_for(lambda: story.step("expert-2") > 0)
        # Two minutes from now at most, which is when the shipped script wants to be told.
        hours, minutes, _ = map(int, cluster.facts(long)["RunTime"].split(":"))
        cluster.run("scontrol", "update", f"jobid={long}", f"TimeLimit={60 * hours + minutes + 2}")
        cluster.wait_for(lambda: f"requeueing {long}" in log.read_text())
        assert "ended with exit code 75" in log.read_text()
        cluster.wait_for(lambda: {f"{array}_0", f"{array}_1"} <= cluster.ended().keys())
        assert cluster.ended()[f"{array}_0"][-1][0] == "FAILED"
        assert cluster.ended()[f"{array}_1"][-1][0] == "COMPLETED"
        cluster.hasten(long)
        cluster.wait_for(lambda: log.read_text().count(f"task {long} trains expert-2") == 2)
        cluster.run("scancel", long)
        cluster.wait_for(lambda: not cluster.queue())
        assert cluster.ended()[long][-1][0] == "CANCELLED"
        assert cluster.ended()[evaluation][-1][0] == "CANCELLED"  # instead of waiting for ever
        again = cluster.run(
            *[ROOT / "slurm/submit.sh", TOY[1], *OPTIONS, f"--study.root={tmp_path}"],
            *["--study.name=study", *options, "--dry-run"],
        )
        assert "--array=0,2 " in again
