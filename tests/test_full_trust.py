"""full/run.py under what happens to long runs, on the tiny checkpoint: stopped, killed, torn checkpoints, bad numbers, bad data."""

import dataclasses
import errno
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_checkpoints import Bomb
from test_full_train import checkpoints, flags, log_of, train, weights  # noqa: F401  (a fixture)
from test_toy_trust import assert_takes_a_value_or_names_itself, kill_while_it_writes, on_a_small_disk, same

from common import checkpoints as storage
from common.checkpoints import read, write
from full import data, run, sample
from full import train as training
from full.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
FIVE = dict(steps=5, batch=2, accumulate=2, save_every=2, random_crop="true", flip="true")  # iterations of two micro-batches


def last(out):
    return sorted((out / "checkpoints").glob("step_*[0-9]"))[-1]


def assert_same_run(a, b):
    """The last checkpoint, file by file, the pipeline's weights and the log, to the bit."""
    assert last(a).name == last(b).name
    files = sorted(f.name for f in last(a).iterdir())
    assert files == sorted(f.name for f in last(b).iterdir()) and "training.pt" in files
    for name in files:
        assert same(read(last(a) / name), read(last(b) / name)), name
    assert same(weights(a / "pipeline"), weights(b / "pipeline"))
    strip = lambda rows: [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib")} for row in rows]  # noqa: E731
    assert strip(log_of(a)) == strip(log_of(b))


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory):  # noqa: F811
    """A run of five iterations of two micro-batches that was never stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(checkpoints, out, **FIVE)
    return out


def stop_and_resume(checkpoints, out, at, number, monkeypatch, capsys, **more):  # noqa: F811
    """Train, with a signal in the midst of the iteration after `at`, and finish."""
    iteration = training.Trainer.iteration

    def stopping(self, batches):
        if self.step == at:
            signal.raise_signal(number)
        return iteration(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "iteration", stopping)
        assert run.main(flags(checkpoints, out, **more)) == 128 + number
    assert "--resume auto" in capsys.readouterr().err and read(last(out) / "training.pt")["step"] == at + 1
    train(checkpoints, out, "--resume", "auto", **more)


@pytest.mark.parametrize("at, number", [(0, signal.SIGTERM), (1, signal.SIGTERM), (3, signal.SIGINT)])
def test_stopped_at_any_step_and_resumed_is_as_if_never_stopped(checkpoints, whole, tmp_path, at, number, monkeypatch, capsys):  # noqa: F811
    stop_and_resume(checkpoints, tmp_path, at, number, monkeypatch, capsys, **FIVE)
    assert_same_run(whole, tmp_path)


def test_with_workers_a_resumed_run_reads_on_where_it_stopped(checkpoints, tmp_path, monkeypatch, capsys):  # noqa: F811
    more = dict(steps=7, batch=2, workers=2, save_every=2, random_crop="true", flip="true")
    train(checkpoints, tmp_path / "whole", **more)
    stop_and_resume(checkpoints, tmp_path / "cut", 4, signal.SIGTERM, monkeypatch, capsys, **more)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def launch(processes, *arguments, own_group=False, script=ROOT / "full" / "run.py"):
    """full/run.py, or another script, in processes of its own: the first of them."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, script, *map(str, arguments)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=own_group,
    )  # fmt: skip


def finish(process):
    """(exit code, stderr) of one that was launched."""
    err = process.communicate(timeout=300)[1]
    return process.returncode, err


def test_two_processes_resume_to_the_bit_also_after_a_torn_checkpoint(checkpoints, tmp_path):  # noqa: F811
    """One run of three steps; one of two, gone on with; and the first with the second process's last file cut: both
    processes go on from the checkpoint before."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def train_two(out, steps, *more):
        code, err = finish(launch(2, *flags(checkpoints, out, steps=steps, batch=2, save_every=1), *more))
        assert code == 0, err[-3000:]
        return err

    def same_as_cut():
        assert [f.name for f in sorted(last(cut).iterdir())] == ["process_0.pt", "process_1.pt", "training.pt"]
        return all(same(read(last(whole) / file.name), read(file)) for file in last(cut).iterdir())

    train_two(whole, 3)
    train_two(cut, 2)
    train_two(cut, 3, "--resume", "auto")
    assert same_as_cut()
    path = last(whole) / "process_1.pt"
    path.write_bytes(path.read_bytes()[:-40])
    err = train_two(whole, 3, "--resume", "auto")
    assert err.count(f"{path} is not a checkpoint of this program, or is cut short") == 1
    assert same_as_cut()


def broken(checkpoints, out, *what, **more):  # noqa: F811
    """full_broken.py in two processes, three steps, each saved: (their exit codes, stderr)."""
    more = flags(checkpoints, out, steps=3, batch=2, save_every=1, **more)
    err = finish(launch(2, *what, *more, script=ROOT / "tests" / "full_broken.py"))[1]
    return [int((out / f"exit_{rank}").read_text()) for rank in (0, 1)], err


def test_two_processes_agree_on_what_one_of_them_saw(checkpoints, tmp_path):  # noqa: F811
    """Images that are no numbers reach the second process alone: both stop, or both skip the step."""
    codes, err = broken(checkpoints, tmp_path / "a", "images", 1, 2)
    assert codes == [2, 2] and err.count("step 2: not finite: ") == 2, err[-3000:]
    assert read(last(tmp_path / "a") / "training.pt")["step"] == 1
    codes, err = broken(checkpoints, tmp_path / "b", "images", 1, 2, skip_nonfinite=1)
    assert codes == [0, 0], err[-3000:]
    assert [row["nonfinite"] for row in log_of(tmp_path / "b")] == [0, 1, 1]
    state = read(last(tmp_path / "b") / "training.pt")
    assert state["step"] == 3
    assert [read(last(tmp_path / "b") / f"process_{rank}.pt")["nonfinite"] for rank in (0, 1)] == [1, 1]
    assert all(x.isfinite().all() for x in state["network"].values())


def test_two_processes_leave_when_one_of_them_cannot_write(checkpoints, tmp_path):  # noqa: F811
    codes, err = broken(checkpoints, tmp_path, "disk", 1, 2)
    assert codes == [2, 2], err[-3000:]
    assert "process_1.pt: cannot be written: the disk is full" in err and "another process could not write its part" in err
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]


def kill_and_resume(checkpoints, tmp_path, times, seed):  # noqa: F811
    """Kill a run -9 so many times at random moments of its training, a checkpoint being written after every iteration,
    and finish it: what was there is there and can be read, and it ends as if it had never been killed."""
    out, draw, kills, more = tmp_path / "run", random.Random(seed), 0, dict(steps=25 * times, batch=2, save_every=1)
    train(checkpoints, tmp_path / "whole", **more)
    while kills < times:
        process, folder = launch(1, *flags(checkpoints, out, **more), "--resume", "auto"), out / "checkpoints"
        err = kill_while_it_writes(process, folder, "step_*/training.pt", 2 * draw.random())
        assert process.returncode == -signal.SIGKILL, "the run was over before it had been killed often enough"
        assert "Traceback" not in err and "looking for the checkpoint before it" not in err, err[-2000:]
        kills += 1
        step = max(read(f / "training.pt")["step"] for f in folder.glob("step_*[0-9]"))
        logged = [json.loads(x)["step"] for x in (out / "log.jsonl").read_text().splitlines(True) if x.endswith("\n")]
        assert step >= max(logged) - 1
    train(checkpoints, out, "--resume", "auto", **more)
    assert same(read(last(out) / "training.pt"), read(last(tmp_path / "whole") / "training.pt"))
    assert not list((out / "checkpoints").glob("*.tmp"))


@pytest.mark.long
def test_killed_twenty_times_it_goes_on(checkpoints, tmp_path):  # noqa: F811
    kill_and_resume(checkpoints, tmp_path, 20, seed=1)


def test_killed_once_it_goes_on(checkpoints, tmp_path):  # noqa: F811
    kill_and_resume(checkpoints, tmp_path, 1, seed=0)


def test_a_run_that_is_there_is_not_written_over(checkpoints, whole, tmp_path, capsys):  # noqa: F811
    out = shutil.copytree(whole, tmp_path / "run")
    assert run.main(flags(checkpoints, out)) == 2
    assert f"--out {out}: holds a run; --resume auto goes on with it" in capsys.readouterr().err
    train(checkpoints, out, "--resume", str(out / "checkpoints" / "step_0000004"), **FIVE)  # not the last: that one goes
    assert_same_run(whole, out)


def test_a_signal_to_the_whole_group_saves_although_workers_get_it_too(checkpoints, tmp_path):  # noqa: F811
    """What `timeout` and torchrun send: SIGTERM to the trainer and to its loader's workers."""
    more = flags(checkpoints, tmp_path, steps=500, batch=2, workers=2, save_every=100)
    process = launch(1, *more, own_group=True)
    while process.poll() is None and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in err, err[-2000:]
    assert read(last(tmp_path) / "training.pt")["step"] > 0


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_used(checkpoints, whole, tmp_path, capsys):  # noqa: F811
    assert [f.name for f in sorted((whole / "checkpoints").iterdir())] == ["step_0000004", "step_0000005"]  # the last two
    for file in ("training.pt", "process_0.pt"):
        out = shutil.copytree(whole, tmp_path / file)
        path = last(out) / file
        path.write_bytes(path.read_bytes()[:-40])
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 5, "torn')  # and rows 5 is there as well: both are from after the checkpoint of step 4
        train(checkpoints, out, "--resume", "auto", **FIVE)
        assert f"{path} is not a checkpoint of this program, or is cut short" in capsys.readouterr().err
        assert_same_run(whole, out)
    for folder in (out / "checkpoints").iterdir():
        (folder / "training.pt").write_bytes(b"")
    assert run.main([*flags(checkpoints, out, **FIVE), "--resume", "auto"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_another_architecture_is_named(checkpoints, whole, tmp_path, capsys):  # noqa: F811
    more = [*flags(checkpoints, tmp_path, backbone="v"), "--resume", str(last(whole))]
    assert run.main(more) == 2
    assert f"--resume {last(whole)}: is of other networks or settings" in capsys.readouterr().err


def test_a_checkpoint_of_another_data_set_or_version_is_named(checkpoints, whole, tmp_path, capsys):  # noqa: F811
    other = shutil.copytree(checkpoints / "images", tmp_path / "others")
    assert run.main([*flags(checkpoints, tmp_path / "run", data=other), "--resume", str(last(whole))]) == 2
    assert f"its data is {checkpoints / 'images'}, not {other}" in capsys.readouterr().err
    folder = shutil.copytree(last(whole), tmp_path / "old")
    write(folder / "training.pt", {k: v for k, v in read(folder / "training.pt").items() if k != "version"})
    assert run.main([*flags(checkpoints, tmp_path / "run"), "--resume", str(folder)]) == 2
    assert "its version is None, not 1" in capsys.readouterr().err


def test_the_same_command_gives_the_same_run(checkpoints, whole, tmp_path):  # noqa: F811
    train(checkpoints, tmp_path, **FIVE)
    assert_same_run(whole, tmp_path)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_stays(checkpoints, tmp_path, monkeypatch, capsys):  # noqa: F811
    write, calls = storage._Summing.write, []

    def full(self, content):
        calls.append(0)
        if len(calls) > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, content)

    out = tmp_path / "run"
    train(checkpoints, out, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(storage._Summing, "write", full)
        assert run.main([*flags(checkpoints, out, steps=3, save_every=1), "--resume", "auto"]) == 2
    assert "the disk is full" in capsys.readouterr().err.splitlines()[-1]
    assert read(last(out) / "training.pt")["step"] == 1
    train(checkpoints, out, "--resume", "auto", steps=3, save_every=1)
    assert read(last(out) / "training.pt")["step"] == 3


def test_a_small_disk_that_fills_up_leaves_the_last_checkpoint_and_the_run_goes_on(checkpoints, tmp_path):  # noqa: F811
    """There is room for one checkpoint, not for two."""
    folder = tmp_path / "disk"
    command = shlex.join([sys.executable, "full/run.py", *flags(checkpoints, folder / "run", steps=2, save_every=1)])
    first, there, second = on_a_small_disk(folder, "6m", f"ACCELERATE_USE_CPU=true {command}", "--resume auto")
    line = first[1].splitlines()[-1]
    assert first[0] == 2 and "the disk is full" in line and f"{folder}/run/checkpoints/step_0000002" in line
    assert there == [f"run/checkpoints/step_0000001/{name}.pt" for name in ("process_0", "training")]
    assert second[0] == 0 and "from step 1" in second[1], second[1][-2000:]


def test_what_is_not_finite_stops_the_run_or_is_skipped_and_counted(checkpoints, tmp_path, monkeypatch, capsys):  # noqa: F811
    make_batch, calls = training.Trainer.make_batch, []

    def broken(self, raw):
        calls.append(0)
        return make_batch(self, raw | {"image": raw["image"] * (float("nan") if len(calls) == 2 else 1)})

    monkeypatch.setattr(training.Trainer, "make_batch", broken)
    assert run.main(flags(checkpoints, tmp_path / "a", steps=3, save_every=1)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    for word in ("step 2: not finite: ", "adversarial", "gradient_norm", "step_0000001", "--skip-nonfinite N"):
        assert word in message, message
    calls.clear()
    train(checkpoints, tmp_path / "b", steps=3, skip_nonfinite=1, save_every=1)
    rows = log_of(tmp_path / "b")
    assert [row["nonfinite"] for row in rows] == [0, 1, 1] and "adversarial" not in rows[1]
    states = [read(tmp_path / "b" / "checkpoints" / f"step_000000{n}" / "training.pt") for n in (2, 3)]
    assert all(x.isfinite().all() for state in states for x in state["network"].values())


def test_the_log_tells_the_health_of_a_run(checkpoints, tmp_path):  # noqa: F811
    train(checkpoints, tmp_path, steps=1, accumulate=2)
    row = log_of(tmp_path)[0]
    for name in ("gradient_adversarial", "gradient_distillation", "gradient_heads", "gradient_norm", "logit_real", "sign_fake", "r1"):
        assert row[name] != 0, name
    assert row["distillation"] == pytest.approx(sum(row[f"distillation_t{t}"] for t in (0, 250, 500, 750)) / 4, rel=1e-5)
    assert row["nonfinite"] == 0 and row["discriminator_won"] in (0, 1)


def test_no_file_that_is_loaded_can_run_code(checkpoints, whole, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A pickle with a call in it in the place of checkpoints and of every network's weights: refused, never run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    target = tmp_path / "ran"
    torch.save({"x": Bomb(target)}, tmp_path / "bomb.pt")
    bombs = ((tmp_path / "bomb.pt").read_bytes(), pickle.dumps(Bomb(target)))
    diffusion, text = "diffusion_pytorch_model.bin", "pytorch_model.bin"
    places = [
        ("backbone", "sd15", f"unet/{diffusion}"), ("backbone", "sd15", f"vae/{diffusion}"), ("backbone", "sd15", f"text_encoder/{text}"),
        ("backbone", "sdxl", f"text_encoder_2/{text}"), ("teacher", "sdxl", f"unet/{diffusion}"), ("vae", "taesd", diffusion),
        ("features", "dino", text), ("c_img", "dino-large", text), ("c_text", "clip", "open_clip_pytorch_model.bin"),
    ]  # fmt: skip
    for setting, source, place in places:
        for bomb in bombs:
            folder = shutil.copytree(checkpoints / source, tmp_path / "copy")
            for weight in (folder / place).parent.glob("*.safetensors"):
                weight.unlink()
            (folder / place).write_bytes(bomb)
            code = run.main(flags(checkpoints, tmp_path / "run", **{setting: folder}))
            err = capsys.readouterr().err.splitlines()[-1]
            assert code == 2 and not target.exists() and str(folder) in err, (place, err)
            if setting == "backbone":  # a pipeline like any other
                code = sample.main(["--pipeline", str(folder), "--prompt", "a fox", "--out", str(tmp_path / "drawn")])
                err = capsys.readouterr().err.splitlines()[-1]
                assert code == 2 and not target.exists() and f"--pipeline {folder}" in err, (place, err)
            shutil.rmtree(folder)
    out = shutil.copytree(whole, tmp_path / "resumed")
    for place in ("training.pt", "process_0.pt"):
        (last(out) / place).unlink()
        write(last(out) / place, {"step": 5, "x": Bomb(target)})  # with this program's checksum
        assert run.main([*flags(checkpoints, out), "--resume", str(last(out))]) == 2 and not target.exists()
        assert f"{place} is not a readable checkpoint (Weights only load failed" in capsys.readouterr().err
        shutil.rmtree(out)
        out = shutil.copytree(whole, tmp_path / "resumed")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert target.exists()  # a real bomb


def test_a_pipelines_list_of_timesteps_that_is_none_is_named(whole, tmp_path, capsys):
    folder = shutil.copytree(whole / "pipeline", tmp_path / "pipeline")
    for text in ("{", "[]", '{"timesteps": ["x"]}', "{}", '{"timesteps": [Infinity]}', '{"timesteps": "199"}', '{"timesteps": [499, 99]}'):
        (folder / "add.json").write_text(text)
        assert sample.main(["--pipeline", str(folder), "--prompt", "a fox", "--out", str(tmp_path / "drawn")]) == 2
        assert str(folder / "add.json") in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("where", ["/sys/run", "file"])
def test_a_folder_that_cannot_be_made_ends_in_one_line(checkpoints, tmp_path, where, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    out = tmp_path / where / "run" if where == "file" else Path(where)
    assert run.main(flags(checkpoints, out)) == 2
    assert str(out) in capsys.readouterr().err.splitlines()[-1]


PICTURES = {
    "8-bit palette": (lambda f: Image.new("P", (80, 80)).save(f, "PNG"), True),
    "16-bit": (lambda f: Image.fromarray(torch.full((80, 80), 40000).to(torch.uint16).numpy()).save(f, "PNG"), True),
    "CMYK": (lambda f: Image.new("CMYK", (80, 80)).save(f, "JPEG"), True),
    "1×1": (lambda f: Image.new("RGB", (1, 1)).save(f, "PNG"), True),
    "20,000 wide": (lambda f: Image.new("L", (20_000, 64)).save(f, "PNG"), True),
    "empty": (lambda f: f.write_bytes(b""), False),
    "text": (lambda f: f.write_text("not an image"), False),
    "truncated": (lambda f: Image.effect_noise((80, 80), 50).save(f, "JPEG") or f.write_bytes(f.read_bytes()[:600]), False),
    "bomb": (lambda f: f.write_bytes(b"P5 60000 60000 255 "), False),
}


@pytest.mark.parametrize("make, usable", PICTURES.values(), ids=PICTURES)
def test_any_picture_becomes_an_image_or_is_refused(tmp_path, make, usable):
    file = tmp_path / "x.img"
    make(file)
    settings = Settings(resolution=64, random_crop=True)
    if usable:
        image, sizes = data.prepare(file.read_bytes(), random.Random(0), settings)
        assert image.shape == (3, 64, 64) and -1 <= image.min() and image.max() <= 1
        if file.read_bytes()[:4] == b"\x89PNG" and make is PICTURES["16-bit"][0]:
            assert image.mean().item() == pytest.approx(40000 / 32768 - 1, abs=0.01)
    else:
        with pytest.raises((OSError, ValueError, SyntaxError, Image.DecompressionBombError)):
            data.prepare(file.read_bytes(), random.Random(0), settings)


def test_captions_of_any_kind_train_and_bad_samples_are_limited(checkpoints, tmp_path, capsys):  # noqa: F811
    folder = shutil.copytree(checkpoints / "images", tmp_path / "images")
    for i, text in enumerate(["", "雪の中の狐", "лиса в снегу", "ثعلب في الثلج", "🦊" * 50, "long " * 2000, "a\n\nb", "\u202eß"]):
        (folder / f"{i:03d}.txt").write_text(text, "utf-8")
    train(checkpoints, tmp_path / "a", data=folder, steps=3)
    assert log_of(tmp_path / "a")[-1]["skipped"] == 0
    for i in range(3):
        (folder / f"{i:03d}.jpg").write_bytes(b"broken")
    train(checkpoints, tmp_path / "b", data=folder, steps=3, max_bad_files=9)
    assert log_of(tmp_path / "b")[-1]["skipped"] >= 3
    assert run.main(flags(checkpoints, tmp_path / "c", data=folder, steps=3, max_bad_files=2)) == 2
    assert "--max-bad-files 2: " in capsys.readouterr().err.splitlines()[-1]


FIELDS = {f.name: f for f in dataclasses.fields(Settings)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_flag_takes_a_value_or_names_itself(name, tmp_path, capsys):
    def configure(argv):
        return run.configure(*run.parse_arguments([*argv, "--out", str(tmp_path)]))

    assert_takes_a_value_or_names_itself(FIELDS[name], configure, capsys)


def test_a_config_that_is_none_is_named(checkpoints, tmp_path, capsys):  # noqa: F811
    for text in ("{", "[]", '{"settings": {"stepz": 1}}', json.dumps({"settings": {"steps": "many"}})):
        (tmp_path / "config.json").write_text(text)
        assert run.main([*flags(checkpoints, tmp_path), "--resume", "auto"]) == 2
        assert str(tmp_path / "config.json") in capsys.readouterr().err.splitlines()[-1]
