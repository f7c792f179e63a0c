"""Studies on a real SLURM cluster on this machine, as docs/slurm.md shows them.

python tests/bench/cluster.py --runs 10    # with two preemptions and a SIGKILL: bit-equal?
python tests/bench/cluster.py --tasks 200  # an array of so many experts of 5 steps each
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster import OPTIONS, ROOT, Cluster, Story, disturbed, running  # noqa: E402

CONFIG = ["--config", str(ROOT / "configs/toys/mdm.yaml"), *OPTIONS]


def weights(study: Path) -> dict[str, bytes]:
    """The files of a study's bundles that hold weights."""
    paths = sorted(study.glob("bundles/*/*.safetensors"))
    return {str(path.relative_to(study)): path.read_bytes() for path in paths}


def disturbances(runs: int, folder: Path) -> None:
    """Compares disturbed studies with one that is launched here, undisturbed."""
    where = [f"--study.root={folder}", "--study.name=local", "--parallel=2"]
    command = [sys.executable, "-m", "expertdiff", "launch", *CONFIG, *where]
    subprocess.run(command, check=True, capture_output=True)
    expected = weights(folder / "local")
    assert len(expected) == 4
    for k in range(runs):
        with running() as cluster:
            log = disturbed(cluster, folder / f"run-{k}")
        equal = weights(folder / f"run-{k}") == expected
        if k == 0:
            print("\n".join(log))
        print(f"run {k}: {log[-1].split()[0]} s, bundles equal to the local ones: {equal}")


def serve(path: Path) -> None:
    """Forks itself for each command: 200 imports of torch would tell nothing about a cluster."""
    from expertdiff.cli import main

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(64)
        while True:
            client, _ = server.accept()
            if os.fork():
                client.close()
                continue
            with client:
                order = json.loads(client.makefile().readline())
                os.environ.clear()
                os.environ.update(order["environment"])
                log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                try:
                    code = main(order["arguments"])
                finally:
                    sys.stdout.flush()
                client.sendall(f"{code}\n".encode())
            os._exit(0)


CLIENT = """#!{python} -S
import json, os, socket, sys
if sys.argv[1] == "launch":
    os.execv(sys.executable, [sys.executable, "-m", "expertdiff", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{path}")
    log = os.readlink("/proc/self/fd/1")
    order = dict(arguments=sys.argv[1:], log=log, environment=dict(os.environ))
    server.sendall((json.dumps(order) + "\\n").encode())
    sys.exit(int(server.makefile().readline()))
"""
"""In the place of the program `expertdiff`, for `fit`."""


def crowd(tasks: int, at_once: int, folder: Path) -> None:
    """An array of many experts; checks what each of them wrote."""
    edges = folder / "intervals.json"
    edges.write_text(json.dumps({"edges": [k / tasks for k in range(tasks + 1)]}))
    study, door = folder / "crowd", folder / "door"
    server = os.fork()
    if not server:
        serve(door)
    try:
        while not door.exists():
            time.sleep(0.1)
        with running(cpus=at_once) as cluster:
            (folder / "bin").mkdir()
            (folder / "bin/expertdiff").write_text(CLIENT.format(python=sys.executable, path=door))
            (folder / "bin/expertdiff").chmod(0o755)
            site = cluster.site("--cpus-per-task=1", setup=f"export PATH={folder}/bin:$PATH;")
            story = Story(cluster, study)
            array, evaluation = story.submit(
                f"--partition={edges}", "--model.process.T=1000", "--model.network.T=1000",
                f"--study.iterations={5 * tasks}",
                "--study.baseline=false", "--study.evaluation.sampler=DDIM", site=site,
            )  # fmt: skip
            answers = []
            while evaluation in cluster.queue():
                began = time.monotonic()
                cluster.run(sys.executable, "-m", "expertdiff", "status", study)
                answers.append(time.monotonic() - began)
                time.sleep(10)
            check(cluster, study, tasks, array, evaluation)
            story.tell(f"{tasks} tasks and the evaluation ended")
            print("\n".join(line[:200] for line in story.lines))
            print(f"expertdiff status: {len(answers)} answers, the slowest in {max(answers):.2f} s")
    finally:
        os.kill(server, 15)
        os.waitpid(server, 0)


def check(cluster: Cluster, study: Path, tasks: int, array: str, evaluation: str) -> None:
    """Every task ended well, once, and wrote its own expert and nothing else."""
    from expertdiff import checkpoints
    from expertdiff.metrics import read_metrics

    ended = cluster.ended()
    wanted = {f"{array}_{k}" for k in range(tasks)} | {evaluation}
    assert ended.keys() == wanted and all(e == [("COMPLETED", "0:0")] for e in ended.values())
    digests = set()
    for k in range(tasks):
        job = study / f"expert-{k}"
        done = json.loads((job / "done.json").read_text())
        newest = checkpoints.newest(job / "checkpoints")
        identity = checkpoints.load(newest)[checkpoints.IDENTITY]
        assert identity["job"] == job.name and done["step"] == 5, (k, identity, done)
        assert identity["interval"] == [k / tasks, (k + 1) / tasks]
        assert all(line["step"] <= 5 for line in read_metrics(job / "metrics.jsonl"))
        assert f"trains expert-{k}:" in (study / f"slurm/{array}_{k}.log").read_text()
        digests.add(done["sha256"])
    assert len(digests) == tasks  # no two are the same
    assert len(weights(study)) == tasks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=0)
    parser.add_argument("--tasks", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="tasks that run at a time")
    ours = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        if ours.runs:
            disturbances(ours.runs, Path(temporary))
        if ours.tasks:
            crowd(ours.tasks, ours.at_once, Path(temporary))
