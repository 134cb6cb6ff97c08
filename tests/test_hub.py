"""Repos for the Hub: what is in them, that everybody can load them, who may publish, and that nothing runs unasked."""

import json
import pickle
import runpy
import shutil
import site
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from hub_server import HubServer
from safetensors.torch import load_file

from visbio_diffusers import VisBioPipeline, VisBioUNet, bundle, hub
from visbio_diffusers.load import load_pipeline


ROOT = Path(__file__).parents[1]
DRAW = """
import json, sys
import numpy as np
import torch

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipe("a cell", num_inference_steps=2, guidance_scale=2.0, output_type="np", generator=seed).images[0]

"""
WITH_PACKAGE = """
from diffusers import AutoModel, DiffusionPipeline
from visbio_diffusers import VisBioPipeline

out, *places = sys.argv[1:]
images = []
for place in places:
    images += [draw(VisBioPipeline.from_pretrained(place)), draw(DiffusionPipeline.from_pretrained(place))]
    pipe = VisBioPipeline.from_pretrained(place, unet=None)
    pipe.register_modules(unet=AutoModel.from_pretrained(place, subfolder="unet"))
    images.append(draw(pipe))
VisBioPipeline.from_pretrained(places[-1]).push_to_hub("alice/again")  # and once more, of what was downloaded
images.append(draw(DiffusionPipeline.from_pretrained("alice/again")))
half = VisBioPipeline.from_pretrained(places[-1], variant="fp16")
images.append(draw(half))
branch = VisBioPipeline.from_pretrained(places[-1], revision="branch")
images.append(draw(branch))
images.append(draw(VisBioPipeline.from_pretrained(places[-1], local_files_only=True)))
np.save(out, images)
"""
WITHOUT_PACKAGE = """
import importlib.util
assert importlib.util.find_spec("visbio_diffusers") is None
sys.modules |= {"accelerate": None, "peft": None}  # which Diffusers and Transformers do without
from diffusers import DiffusionPipeline

out, *places = sys.argv[1:]
images = []
for place in places:
    pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
    images.append(draw(pipe))
np.save(out, images)
"""
OFFLINE = """
from visbio_diffusers import VisBioPipeline

out, *places = sys.argv[1:]
np.save(out, [draw(VisBioPipeline.from_pretrained(place)) for place in places])
"""
ADAPTER = """
from visbio_diffusers import VisBioPipeline
from visbio_diffusers.load import load_pipeline

folder, adapter = sys.argv[1:]
pipe = VisBioPipeline.from_pretrained(folder)
pipe.load_lora_weights(adapter, adapter_name="one")
assert pipe.get_list_adapters() == {"unet": ["one"]}
facts = load_pipeline(folder, "cpu", lora=adapter)[1]
assert facts["lora"] == adapter and facts["caption_banks"] == "bloodmnist", facts
"""


@pytest.fixture(scope="module")
def trained(tiny_pipeline_dir, tmp_path_factory):
    """A pipeline as a training leaves it."""
    folder = tmp_path_factory.mktemp("trained") / "pipeline"
    shutil.copytree(tiny_pipeline_dir, folder)
    record = json.loads((ROOT / "model_cards" / "visbio-blood-28" / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"caption_banks": []}))
    return folder


@pytest.fixture(scope="module")
def server():
    with HubServer({"hf_alice": ("alice", "write"), "hf_bob": ("bob", "read")}) as running:
        yield running


@pytest.fixture
def as_user(server, monkeypatch):
    """Return a function that makes this process speak to the loopback Hub with a token, or without one."""

    def log_in(token=None):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN", raising=False)
        return server

    return log_in


@pytest.fixture(scope="module")
def published(trained, server, tmp_path_factory):
    """The folder of a repo, uploaded to alice/tiny and, another time, to its branch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        folder = tmp_path_factory.mktemp("published") / "tiny"
        hub.write_repo(trained, folder, "alice/tiny", variant="fp16", max_shard_size="100KB")
        repo_id = hub.open_repo("tiny", private=True)
        hub.upload(folder, repo_id)
        other = tmp_path_factory.mktemp("other") / "tiny"
        hub.write_repo(trained, other, "alice/tiny")
        hub.upload(other, repo_id, revision="branch", message="in one piece")
    return folder


def run(code, *arguments, environment):
    Path(environment["HF_HOME"]).mkdir(exist_ok=True)  # to be in: from here Python would find the package in any case
    done = subprocess.run(
        [*environment.pop("command", [sys.executable]), "-c", DRAW + code, *map(str, arguments)],
        cwd=environment["HF_HOME"], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_everybody_can_load_a_repo(published, server, tmp_path):
    """With the package, offline after that, and without the package: folder and Hub, one image from one seed."""
    settings = server.environment("hf_alice", tmp_path) | {"PYTHONPATH": str(ROOT)}
    run(WITH_PACKAGE, tmp_path / "with.npy", published, "alice/tiny", environment=dict(settings))
    images = np.load(tmp_path / "with.npy")
    half = images[-3]
    assert np.abs(half - images[0]).max() < 0.02 and not np.array_equal(half, images[0])
    for image in np.delete(images, len(images) - 3, axis=0):
        np.testing.assert_array_equal(image, images[0])

    settings |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    run(OFFLINE, tmp_path / "offline.npy", "alice/tiny", environment=dict(settings))
    np.testing.assert_array_equal(np.load(tmp_path / "offline.npy")[0], images[0])

    # With -S Python does not read the .pth file by which the package is installed here.
    alone = server.environment("hf_alice", tmp_path / "alone") | {"PYTHONPATH": site.getsitepackages()[0]}
    alone |= {"command": [sys.executable, "-S"]}
    run(WITHOUT_PACKAGE, tmp_path / "without.npy", published, "alice/tiny", environment=alone)
    for image in np.load(tmp_path / "without.npy"):
        np.testing.assert_array_equal(image, images[0])


def test_repo_is_whole_and_its_index_names_the_package(published, server, trained):
    files = server.files("alice/tiny", revision="main")
    index = json.loads(files["model_index.json"])
    assert index["_class_name"] == "VisBioPipeline" and index["unet"] == ["visbio_diffusers", "VisBioUNet"]
    assert {"README.md", "pipeline.py", "unet/visbio_diffusers.py", "training.json"} <= set(files)
    assert "tokenizer/tokenizer.json" in files and "manifest.json" not in files
    assert b'custom_pipeline="alice/tiny"' in files["README.md"]
    shards = [name for name in files if name.startswith("unet/diffusion_pytorch_model-")]
    assert len(shards) > 1 and "unet/diffusion_pytorch_model.safetensors" not in files
    branch = server.files("alice/tiny", revision="branch")
    whole = (trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert branch["unet/diffusion_pytorch_model.safetensors"] == whole  # and no shards of the commit before
    assert not any("-of-" in name for name in branch)


def test_weights_are_copied_bit_by_bit_and_halved_for_the_variant(published, trained):
    parts = sorted(published.glob("unet/diffusion_pytorch_model-*.safetensors"))
    weights = {name: value for part in parts for name, value in load_file(part).items()}
    source = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == source.keys() and all(torch.equal(weights[name], source[name]) for name in source)
    halved = {n: v for part in published.glob("unet/*.fp16-*.safetensors") for n, v in load_file(part).items()}
    assert all(torch.equal(halved[name], source[name].half()) for name in source)


def test_repo_of_a_repo_with_a_variant_has_the_same_weights(published, trained, tmp_path):
    hub.write_repo(published, tmp_path / "again", "alice/again", max_shard_size="5GB")
    again = load_file(tmp_path / "again" / "unet" / "diffusion_pytorch_model.safetensors")
    source = load_file(trained / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], source[name]) and again[name].dtype == source[name].dtype for name in source)
    assert load_pipeline(str(trained))[1]["model_sha256"] == load_pipeline(str(tmp_path / "again"))[1]["model_sha256"]


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [
        (None, "tiny", "run `hf auth login`, or set HF_TOKEN"),
        ("hf_unknown", "tiny", "may not write to tiny"),
        ("hf_bob", "bob/tiny", "may not write to bob/tiny"),
        ("hf_alice", "bob/tiny", "may not write to bob/tiny"),
        ("hf_alice", "a/b/c", "Repo id must be in the form"),
    ],
)
def test_who_may_not_publish_is_told_so_in_one_line(token, repo, message, as_user):
    as_user(token)
    with pytest.raises(ValueError, match=message) as error:
        hub.open_repo(repo)
    assert "\n" not in str(error.value)


def test_public_repo_is_not_taken_for_a_private_one(as_user):
    as_user("hf_alice")
    hub.open_repo("open-to-all")
    with pytest.raises(ValueError, match="alice/open-to-all is there and public"):
        hub.open_repo("open-to-all", private=True)


def test_card_that_the_hub_refuses_is_told_in_one_line(as_user, tmp_path):
    as_user("hf_alice")
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(ValueError, match="license.* must be one of .*about.md") as error:
        hub.upload(tmp_path, hub.open_repo("badly-licensed"))
    assert "\n" not in str(error.value)


def test_branch_that_the_hub_refuses_is_not_taken_for_a_bad_card(as_user, tmp_path):
    as_user("hf_alice")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(OSError, match="the Hub refused it .*Invalid reference name: no branch"):
        hub.upload(tmp_path, hub.open_repo("well-licensed"), revision="no branch")


def test_hub_out_of_reach_is_told_in_one_line(as_user, monkeypatch):
    as_user("hf_alice")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="the Hub did not take it .*: try the same command again"):
        hub.open_repo("tiny")


def test_interrupted_upload_goes_on(published, as_user):
    server = as_user("hf_alice")
    repo_id = hub.open_repo("interrupted")
    server.fail_uploads_after(2, status=403)
    with pytest.raises(OSError, match="the Hub refused it .*: mend that, then the same command goes on"):
        hub.upload(published, repo_id)
    server.reset_faults()
    sent = len(server.repos[repo_id].objects)
    before = len(server.requests)
    hub.upload(published, repo_id)
    puts = [path for method, path in server.requests[before:] if method == "PUT"]
    files = server.files(repo_id, revision="main")
    large = {content for name, content in files.items() if name.endswith((".safetensors", ".png"))}
    assert sent >= 1 and len(puts) == len(large) - sent
    assert set(files) >= {path.relative_to(published).as_posix() for path in published.rglob("*") if path.is_file()}


def test_pull_request(published, as_user):
    server = as_user("hf_alice")
    before = server.files("alice/tiny", revision="main")
    (published / "note.txt").write_text("new")
    place = hub.upload(published, "alice/tiny", create_pr=True)
    (published / "note.txt").unlink()
    assert "discussions" in place and server.files("alice/tiny", revision="main") == before
    assert server.files("alice/tiny", revision="refs/pr/1")["note.txt"] == b"new"
    (published / "note.txt").write_text("newer")
    hub.upload(published, "alice/tiny", revision="refs/pr/1")
    (published / "note.txt").unlink()
    assert server.files("alice/tiny", revision="refs/pr/1")["note.txt"] == b"newer"
    server.add_repo("bob/public")
    assert hub.open_repo("bob/public", pull_request=True) == "bob/public"
    with pytest.raises(ValueError, match="may not write to bob/nothing"):
        hub.open_repo("bob/nothing", pull_request=True)


def test_training_publishes_what_it_made_or_refuses_before_it_begins(tiny_pipeline_dir, as_user, tmp_path):
    script = runpy.run_path(str(ROOT / "train_scripts" / "train_text_to_image_lora.py"))
    data = tmp_path / "bloodmnist_small.npz"
    np.savez(
        data, train_images=np.zeros((16, 28, 28, 3), np.uint8), train_labels=np.arange(16, dtype=np.uint8)[:, None] % 8
    )

    def train(name):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = ["--preset", "tiny", "--resolution", "8", "--pretrained_model_name_or_path", str(tiny_pipeline_dir)]
        argv += ["--dataset_name", str(data), "--output_dir", str(tmp_path / name), "--max_train_steps", "2"]
        return script["main"](script["parse"](script["LoraTrainConfig"], script["PRESETS"], [*argv, "--push_to_hub"]))

    as_user()
    with pytest.raises(ValueError, match="run `hf auth login`"):
        train("refused")
    assert not (tmp_path / "refused").exists()
    server = as_user("hf_alice")
    assert train("my-adapter") == 0
    files = server.files("alice/my-adapter", revision="main")
    assert b"# my-adapter" in files["README.md"] and b'load_lora_weights("alice/my-adapter")' in files["README.md"]
    assert files["pytorch_lora_weights.safetensors"] and "lora" in files["README.md"].decode().split("---")[1]
    run(ADAPTER, tiny_pipeline_dir, "alice/my-adapter", environment=server.environment("hf_alice", tmp_path / "home"))


def test_repo_of_a_text_encoder(tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "run" / "text_encoder"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_pipeline_dir / part, folder, dirs_exist_ok=True)
    record = json.loads((ROOT / "model_cards" / "visbio-blood-28" / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(record | {"config": {"caption_banks": ["bloodmnist"]}}))
    with hub.made_repo(folder, "me/words") as repo:
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in repo.iterdir()}
    with pytest.raises(ValueError, match="is no pipeline: variants and shards are for those"):
        hub.write_repo(folder, tmp_path / "repo", "me/words", variant="fp16")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=f"{folder.name} does not load|words does not load"):
        with hub.made_repo(folder, "me/words"):
            pass


class Mark:
    """Leaves a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.pkl"])
def test_pickled_weights_are_refused(name, tiny_pipeline_dir, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    pickle.loads(pickle.dumps(Mark(mark)))
    assert mark.exists()
    mark.unlink()
    shutil.copytree(tiny_pipeline_dir, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Mark(mark)))
    for load in (VisBioPipeline.from_pretrained, DiffusionPipeline.from_pretrained, load_pipeline):
        with pytest.raises((OSError, ValueError), match="safetensors"):
            load(str(folder))
    with pytest.raises(OSError, match="safetensors"):
        VisBioUNet.from_pretrained(folder, subfolder="unet")
    if name.endswith(".bin"):  # who asks for it still gets no code run: torch loads tensors alone
        with pytest.raises((OSError, pickle.UnpicklingError)):
            VisBioUNet.from_pretrained(folder, subfolder="unet", use_safetensors=False)
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(pickle.dumps(Mark(mark)))
    pipe = VisBioPipeline.from_pretrained(tiny_pipeline_dir)
    for settings in ({}, {"use_safetensors": True}, {"weight_name": "pytorch_lora_weights.bin"}):
        with pytest.raises((OSError, ValueError)):
            pipe.load_lora_weights(tmp_path, **settings)
    with pytest.raises(
        FileNotFoundError, match="no adapter .*bin: give a folder with pytorch_lora_weights.safetensors"
    ):
        load_pipeline(str(tiny_pipeline_dir), lora=str(tmp_path / "pytorch_lora_weights.bin"))
    assert not mark.exists()


def test_code_in_a_repo_is_not_run_unasked(published, tmp_path):
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(published, folder)
    for file in ("pipeline.py", "unet/visbio_diffusers.py", "unet/other.py"):
        (folder / file).write_text(f"open({str(mark)!r}, 'w')\n")
    for load in (VisBioPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        load(folder)  # by the package's own classes
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["other", "VisBioUNet"]}))
    for load in (VisBioPipeline.from_pretrained, DiffusionPipeline.from_pretrained, load_pipeline):
        with pytest.raises(ValueError, match="trust_remote_code=True|cannot load the model"):
            load(str(folder))
    assert not mark.exists()


def test_one_name_for_two_things_fits_into_no_one_file(tmp_path, monkeypatch):
    (tmp_path / "second.py").write_text("SIZE = 2\n\n\ndef side():\n    return SIZE\n")
    (tmp_path / "first.py").write_text(
        "from second import side\n\n\nSIZE = 1\n\n\ndef area():\n    return SIZE * side()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "def area" in bundle.bundle("area", "first", ["area"])  # second is a library to it
    monkeypatch.setattr(bundle, "PACKAGE", "second")
    with pytest.raises(ValueError, match="two modules mean different things by SIZE"):
        bundle.bundle("area", "first", ["area"])


def test_opt_in_to_pickled_weights_of_a_unet(tiny_unet, tmp_path):
    unet = tiny_unet()
    unet.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VisBioUNet.from_pretrained(tmp_path)
    loaded = VisBioUNet.from_pretrained(tmp_path, use_safetensors=False)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), unet.parameters(), strict=True))


def test_adapter_is_tried_on_its_own_base(tmp_path):
    weights = ROOT / "model_cards" / "visbio-nuclei-lora" / "pytorch_lora_weights.safetensors"
    shutil.copy(weights, tmp_path)
    (tmp_path / "about.md").write_text("# from elsewhere\n")
    with hub.made_repo(tmp_path, "me/nuclei") as repo:  # no training.json: on the model that comes with the package
        assert "# from elsewhere" in (repo / "README.md").read_text()
    config = {"pretrained_model_name_or_path": "/gone/pipeline"}
    (tmp_path / "training.json").write_text(json.dumps({"config": config}))
    with pytest.raises(FileNotFoundError, match="no model folder /gone/pipeline: give a saved pipeline"):
        with hub.made_repo(tmp_path, "me/nuclei"):
            pass


def test_folder_that_no_training_wrote_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give what a training has written"):
        hub.write_repo(tmp_path, tmp_path / "repo", "a/b")
