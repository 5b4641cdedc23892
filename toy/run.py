"""Train a teacher, distil it with ADD, look at the pictures and the table: python toy/run.py

Stages: data, feature network F, metric network, teacher, ADD, evaluation, report. Each is kept in
the run folder and reused when its settings are the same. Stop with Ctrl-C at any time; `--resume`
continues.
"""

import os

# OpenMP's idle threads spin for milliseconds by default. On a machine that does anything else too,
# that made a step 15 times slower; never spinning costs 40 % on an idle one. This many turns
# (microseconds) are a good middle.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.checkpoints import read_last, write_text
from common.device import be_deterministic, peak_memory
from common.fid import load_fid
from common.flags import add_flags, from_dict
from common.origin import device_name
from toy import pictures, report
from toy.distil import distil, make_student
from toy.evaluate import evaluate
from toy.features import make_features
from toy.loop import Stage
from toy.metrics import train_metric_net
from toy.program import exit_code, load_data, pick_device, resolve, set_threads
from toy.settings import PRESETS, STAGES, Settings, stage_key
from toy.teacher import make_teacher


def parse_arguments(argv):
    """(arguments, {setting: value} of those given)."""
    parser = argparse.ArgumentParser(
        prog="toy/run.py",
        usage="%(prog)s [--preset X] [--dataset X] [--out DIR] [--resume] [other flags]",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="cpu", help="default: cpu, also on a GPU"
    )
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first available")
    parser.add_argument("--out", type=Path, help="run folder; default: runs/DATASET-PRESET")
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted run with its settings"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=0,
        help="save and stop after this many minutes (exit code 142); continue with --resume "
        "(default: no limit)",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    group = parser.add_argument_group("settings (what is not given comes from the preset)")
    add_flags(group, Settings, "cpu preset")
    arguments = parser.parse_args(argv)
    own = {"preset", "device", "out", "resume", "threads", "max_minutes", "debug"}
    return arguments, {name: value for name, value in vars(arguments).items() if name not in own}


def configure(arguments, given):
    """(settings, preset, run folder): from the preset and the flags, or on --resume from the
    folder's config.json."""
    preset = arguments.preset
    settings = Settings(**PRESETS[preset] | given)
    folder = arguments.out or Path("runs") / f"{settings.dataset}-{preset}"
    config = folder / "config.json"
    if arguments.resume:
        if not config.exists():
            raise ValueError(
                f"--resume: there is no run in {folder}; "
                "name its folder with --out, or leave --resume out"
            )
        try:
            stored = json.loads(config.read_text())
            preset, settings = stored["preset"], from_dict(Settings, stored["settings"] | given)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{config}: not the settings of a run ({error}); start over without --resume"
            ) from error
    return settings, preset, folder


def refuse_unfinished(folder, stage, key):
    """ValueError if a stage of this very run was interrupted: going on has to be asked for, and so
    has throwing away."""
    state = read_last(folder / stage / "checkpoint.pt")
    if state and state.get("key") == key and not state["finished"]:
        raise ValueError(
            f"--out {folder}: {stage} is unfinished, at step {state['step']}; "
            f"--resume continues it, removing {folder / stage} starts it over"
        )


def read_results(path):
    """results.json; {} if there is none, or none that can be read: it is soon made again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def train(stage, settings):
    """(metric network, teacher, student before ADD, student, {stage: seconds}); what is finished
    comes from its checkpoint. stage(name) is the Stage of that name."""
    seconds = {}
    # A download comes first: one that fails should not cost the training of a network.
    public = None if settings.conditional else make_teacher(stage("teacher"))
    features, seconds["features"] = make_features(stage("features"))
    metric_net, seconds["metric"] = train_metric_net(stage("metric"))
    teacher, seconds["teacher"] = public or make_teacher(stage("teacher"))
    second = None
    if other := settings.for_second_teacher:
        made = dataclasses.replace(stage("second"), settings=other)
        second, seconds["second teacher"] = make_teacher(made)
    started = make_student(teacher, settings, second).eval()
    student, seconds["ADD"] = distil(stage("distil"), teacher, features, second)
    return metric_net, teacher, started, student, seconds


def draw(folder, data, settings, teacher, started, student, results, device):
    """The pictures of the report."""
    best = results["best_guidance"]
    path = folder / "comparison.png"
    pictures.comparison(path, teacher, started, student, data, settings, best, device)
    pictures.refinement(folder / "refinement.png", student, data, settings, device)
    pictures.targets(folder / "targets.png", student, teacher, data, settings, device)
    pictures.curves(folder / "curves.png", folder)
    pictures.cost(folder / "cost.png", results)


def run(arguments, given):
    """The whole job; returns (run folder, results, preset)."""
    device = pick_device(arguments.device)
    settings, preset, folder = configure(arguments, given)
    set_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True  # the shapes never change
    if settings.deterministic:
        be_deterministic()
    began = time.time()
    data = load_data(settings)
    seconds = {"data": time.time() - began}
    on = device_name(device)
    print(f"data: {data.name} · preset: {preset} · device: {on} · folder: {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    settings = resolve(settings, data.kind, device)
    config = {"preset": preset, "settings": dataclasses.asdict(settings)}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    keys = {name: stage_key(settings, name, data.fingerprint) for name in STAGES}
    if not arguments.resume:
        for name, key in keys.items():
            refuse_unfinished(folder, name, key)

    def stage(name):
        return Stage(folder / name, data, settings, device, keys[name])

    path, fid = folder / "results.json", None
    stored = read_results(path)
    scored = stored.get("key") == keys["eval"]
    if settings.inception != "none" and not scored:  # before anything is trained: it may fail
        fid = load_fid("" if settings.inception == "auto" else settings.inception).to(device)
    metric_net, teacher, started, student, more = train(stage, settings)
    if not scored:
        began = time.time()
        print("evaluation", flush=True)
        results = evaluate(data, settings, metric_net, teacher, started, student, device, fid)
        stored = {"key": keys["eval"], "seconds": time.time() - began, "results": results}
        write_text(path, json.dumps(stored, indent=1) + "\n")
    results, seconds = stored["results"], seconds | more | {"evaluation": stored["seconds"]}

    began = time.time()
    draw(folder, data, settings, teacher, started, student, results, device)
    seconds["pictures"] = time.time() - began
    command = ("python toy/run.py " + shlex.join(sys.argv[1:])).strip()
    gib = peak_memory(torch.device("cpu"))
    report.write_report(folder, data, settings, preset, command, results, seconds, device, gib)
    return folder, results, preset


def main(argv=None):
    """The command; returns its exit code."""
    arguments, given = parse_arguments(argv)

    def work():
        if not 0 <= arguments.max_minutes < 1e6:
            raise ValueError(f"--max-minutes {arguments.max_minutes:g}: must be 0 to a million")
        signal.setitimer(signal.ITIMER_REAL, 60 * arguments.max_minutes)
        try:
            folder, results, preset = run(arguments, given)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        print("\n".join(["", *report.table(results), ""]))
        for what, value, goal, met in report.goals(results, preset):
            print(f"{'met   ' if met else 'missed'}  {what}: {value:.3f} (goal {goal})")
        print(f"\nreport and pictures: {folder / 'report.md'}")

    again = "the same command with --resume continues from the last checkpoint"
    return exit_code("toy/run.py", work, arguments.debug, again)


if __name__ == "__main__":
    sys.exit(main())
