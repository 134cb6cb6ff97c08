"""The loopback Hub, used by the real `huggingface_hub` and Diffusers."""

import json
import re
import subprocess
import sys

import pytest
import requests
from hub_server import GITATTRIBUTES, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


CARD = "---\nlicense: apache-2.0\n---\n# A model\n"
WEIGHTS = {f"unet/part-{number}.safetensors": bytes([number]) * 60_000 for number in range(4)}
FILES = {"README.md": CARD.encode(), "config.json": b"{}", "notes.txt": b"x\n" * 20_000, **WEIGHTS}


@pytest.fixture
def hub(monkeypatch):
    """Return a Hub with a writer alice, a writer carol and a reader bob, and have this process use plain HTTP."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tokens = {"hf_alice": ("alice", "write"), "hf_carol": ("carol", "write"), "hf_bob": ("bob", "read")}
    with HubServer(tokens) as server:
        yield server


def api(hub, token="hf_alice"):
    return HfApi(endpoint=hub.url, token=token)


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "model"


def read(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run(script, environment):
    """Run a script in a fresh process and return what it prints."""
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def status(call, *args, **kwargs):
    """Return the HTTP status with which a call fails."""
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    return error.value.response.status_code


def puts(hub):
    return [path for method, path in hub.requests if method == "PUT"]


def test_a_folder_comes_back_and_is_cached(hub, folder, tmp_path):
    upload = f"""
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("alice/model", private=True, exist_ok=True)
api.create_repo("alice/model", private=True, exist_ok=True)
api.auth_check("alice/model", write=True)
print(api.whoami()["name"], api.upload_folder(repo_id="alice/model", folder_path={str(folder)!r}).oid)
"""
    name, sha = run(upload, hub.environment("hf_alice", tmp_path / "writer")).split()
    assert name == "alice"
    assert hub.files("alice/model") == hub.files("alice/model", sha) == {".gitattributes": GITATTRIBUTES, **FILES}
    assert len(puts(hub)) == len(WEIGHTS)

    environment = hub.environment("hf_alice", tmp_path / "reader")
    script = "from huggingface_hub import snapshot_download; print(snapshot_download('alice/model'))"
    target = tmp_path / "reader" / "hub" / "models--alice--model" / "snapshots" / sha
    assert run(script, environment).strip() == str(target)
    assert read(target) == hub.files("alice/model")
    hub.requests.clear()
    assert run(script, {**environment, "HF_HUB_OFFLINE": "1"}).strip() == str(target)
    assert hub.requests == []


def test_other_hosts_are_not_reached(hub, tmp_path):
    script = """
import requests
for url in ("http://example.org/", "https://huggingface.co/"):
    try:
        print(requests.get(url, timeout=10).status_code)
    except requests.exceptions.ProxyError:
        print("refused")
"""
    assert run(script, hub.environment(None, tmp_path)).split() == ["404", "refused"]
    assert hub.requests == [("GET", "http://example.org/"), ("CONNECT", "huggingface.co:443")]


def test_branches_revisions_and_information(hub):
    user = api(hub)
    assert user.create_repo("model").repo_id == "alice/model"
    start = user.model_info("alice/model").sha
    user.create_branch("alice/model", branch="dev", revision="main")
    user.create_branch("alice/model", branch="dev", exist_ok=True)
    assert status(user.create_branch, "alice/model", branch="dev") == 409
    operations = [CommitOperationAdd(path, data) for path, data in FILES.items()]
    commit = user.create_commit("alice/model", operations, commit_message="Weights", revision="dev")
    assert {b.name: b.target_commit for b in user.list_repo_refs("alice/model").branches} == {
        "main": start,
        "dev": commit.oid,
    }
    assert user.list_repo_files("alice/model") == [".gitattributes"]
    information = user.model_info("alice/model", revision="dev", files_metadata=True)
    assert information.sha == commit.oid and information.private is False
    assert {s.rfilename: s.size for s in information.siblings} == {
        path: len(data) for path, data in hub.files("alice/model", "dev").items()
    }
    assert {s.rfilename for s in information.siblings if s.lfs} == set(WEIGHTS)
    assert [e.path for e in user.list_repo_tree("alice/model", revision="dev")] == [
        ".gitattributes", "README.md", "config.json", "notes.txt", "unet",
    ]  # fmt: skip
    assert len(list(user.list_repo_tree("alice/model", "unet", recursive=True, revision="dev"))) == len(WEIGHTS)

    operations = [CommitOperationDelete("unet/"), CommitOperationDelete("notes.txt")]
    user.create_commit("alice/model", operations, commit_message="Delete", revision="dev", parent_commit=commit.oid)
    assert sorted(hub.files("alice/model", "dev")) == [".gitattributes", "README.md", "config.json"]
    stale = {"commit_message": "Stale", "revision": "dev", "parent_commit": start}
    assert status(user.create_commit, "alice/model", [CommitOperationAdd("a", b"a")], **stale) == 412
    assert len(hub.files("alice/model", commit.oid)) == 1 + len(FILES)


def test_a_pull_request_leaves_the_branch(hub, tmp_path):
    hub.add_repo("alice/model", FILES)
    before = hub.files("alice/model")
    new = b"1" * 20_000
    commit = api(hub, "hf_carol").upload_file(
        path_or_fileobj=new, path_in_repo="new.bin", repo_id="alice/model", create_pr=True
    )
    assert commit.pr_url == f"{hub.url}/alice/model/discussions/1" and commit.pr_revision == "refs/pr/1"
    assert hub.files("alice/model") == before
    assert hub.files("alice/model", "refs/pr/1") == {**before, "new.bin": new}
    path = hf_hub_download("alice/model", "new.bin", revision="refs/pr/1", endpoint=hub.url, cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == new
    refs = api(hub).list_repo_refs("alice/model", include_pull_requests=True)
    assert [(r.ref, r.target_commit) for r in refs.pull_requests] == [("refs/pr/1", commit.oid)]


def test_permissions(hub, tmp_path):
    alice, carol, bob = api(hub), api(hub, "hf_carol"), api(hub, "hf_bob")
    nobody, stranger = api(hub, False), api(hub, "hf_stranger")
    hub.add_repo("alice/open", FILES)
    hub.add_repo("alice/secret", FILES, private=True)

    assert status(stranger.whoami) == status(stranger.model_info, "alice/open") == 401
    assert status(nobody.create_repo, "alice/new") == status(stranger.create_repo, "alice/new") == 401
    assert status(nobody.model_info, "alice/secret") == 401
    assert nobody.model_info("alice/open").id == bob.model_info("alice/open").id == "alice/open"
    assert bob.whoami()["auth"]["accessToken"]["role"] == "read"

    arguments = {"path_or_fileobj": b"a", "path_in_repo": "a.txt"}
    assert status(nobody.upload_file, repo_id="alice/open", **arguments) == 401
    assert status(bob.create_repo, "bob/new") == status(carol.create_repo, "alice/new") == 403
    for user in (bob, carol):
        assert status(user.upload_file, repo_id="alice/open", **arguments) == 403
        assert status(user.create_branch, "alice/open", branch="dev") == 403
        for call in (user.model_info, user.auth_check, user.list_repo_refs, user.list_repo_files):
            with pytest.raises(RepositoryNotFoundError):
                call("alice/secret")
        assert status(user.upload_file, repo_id="alice/secret", **arguments) == 404
        assert status(user.auth_check, "alice/open", write=True) == 403
    assert set(hub.repos) == {"alice/open", "alice/secret"}
    assert "a.txt" not in hub.files("alice/open")

    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/missing")
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/open", revision="missing")
    with pytest.raises(RevisionNotFoundError):
        alice.upload_file(repo_id="alice/open", revision="missing", **arguments)
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download("alice/open", "config.json", revision="missing", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        alice.hf_hub_download("alice/open", "missing.json", cache_dir=tmp_path)
    with pytest.raises(RepositoryNotFoundError):
        bob.hf_hub_download("alice/secret", "config.json", cache_dir=tmp_path)
    assert alice.file_exists("alice/secret", "config.json") and not alice.file_exists("alice/secret", "missing")


def test_a_failed_upload_goes_on_without_sending_again(hub, folder):
    user = api(hub)
    user.create_repo("alice/model")
    hub.fail_uploads_after(2, status=403)
    with pytest.raises(RuntimeError, match="Error while uploading"):
        user.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(hub.repos["alice/model"].objects) == 2 and "config.json" not in hub.files("alice/model")
    sent = set(hub.repos["alice/model"].objects)

    hub.reset_faults()
    hub.requests.clear()
    user.upload_folder(repo_id="alice/model", folder_path=folder)
    again = [path.split("/")[-1] for path in puts(hub)]
    assert len(again) == 2 and not sent & set(again)
    assert hub.files("alice/model") == {".gitattributes": GITATTRIBUTES, **FILES}
    user.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(hub.repos["alice/model"].commits) == 2 and len(puts(hub)) == 2


@pytest.mark.parametrize("answer", [500, None])
def test_the_client_repeats_an_upload(hub, answer):
    hub.add_repo("alice/model")
    hub.fail_uploads_after(0, status=answer, times=1)
    api(hub).upload_file(path_or_fileobj=b"1" * 20_000, path_in_repo="w.bin", repo_id="alice/model")
    assert len(puts(hub)) == 2 and puts(hub)[0] == puts(hub)[1]
    assert hub.files("alice/model")["w.bin"] == b"1" * 20_000


def test_parts_of_a_file(hub):
    hub.add_repo("alice/model", {"w.bin": bytes(range(100))})
    url = f"{hub.url}/alice/model/resolve/main/w.bin"
    for asked, content in (("0-9", range(10)), ("90-", range(90, 100)), ("95-200", range(95, 100))):
        answer = requests.get(url, headers={"Range": f"bytes={asked}"}, timeout=10)
        assert (answer.status_code, answer.content) == (206, bytes(content))
        assert answer.headers["Content-Range"] == f"bytes {content[0]}-{content[-1]}/100"
    assert requests.get(url, headers={"Range": "bytes=100-"}, timeout=10).status_code == 416
    head = requests.head(url, timeout=10)
    assert head.headers["X-Linked-Size"] == head.headers["Content-Length"] == "100"
    assert head.headers["X-Repo-Commit"] == hub.repos["alice/model"].branches["main"] and head.content == b""


def test_content_must_have_its_digest(hub):
    hub.add_repo("alice/model")
    assert requests.put(f"{hub.url}/alice/model.git/info/lfs/objects/{'0' * 64}", b"a", timeout=10).status_code == 400
    assert hub.repos["alice/model"].objects == {}


def test_a_closed_hub_answers_nobody():
    session = requests.Session()
    session.trust_env = False
    with HubServer({}) as server:
        server.add_repo("alice/model")
        url = f"{server.url}/api/models/alice/model"
        assert session.get(url, timeout=10).json()["author"] == "alice"
    with pytest.raises(requests.ConnectionError):
        session.get(url, timeout=10)


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path):
    data = bytes(range(256)) * 50_000
    hub.add_repo("alice/model", {"w.bin": data})
    hub.cut_download_after(len(data) - 1)
    path = hf_hub_download("alice/model", "w.bin", endpoint=hub.url, cache_dir=tmp_path, token=False)
    with open(path, "rb") as file:
        assert file.read() == data
    [(name, part)] = hub.ranges
    assert name == "w.bin" and re.fullmatch("bytes=[1-9][0-9]*-", part)


def test_a_commit_needs_a_valid_card(hub):
    user = api(hub)
    hub.add_repo("alice/model")
    upload = {"path_in_repo": "README.md", "repo_id": "alice/model"}
    for metadata, message in (("license: mine", '"license" must be one of'), ("- a", "mapping"), ("a: [", "parsing")):
        with pytest.raises(ValueError, match=message):
            user.upload_file(path_or_fileobj=f"---\n{metadata}\n---\n".encode(), **upload)
    assert "README.md" not in hub.files("alice/model")
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        user.upload_file(path_or_fileobj=b"# A model\n", **upload)
    user.upload_file(path_or_fileobj=CARD.encode(), **upload)
    assert hub.files("alice/model")["README.md"] == CARD.encode()


def test_validate_of_a_model_card(hub, tmp_path):
    script = f"""
from huggingface_hub import ModelCard
ModelCard({CARD!r}).validate()
try:
    ModelCard({CARD.replace("apache-2.0", "mine")!r}).validate()
except ValueError as error:
    print(error)
"""
    answer = json.loads(run(script, hub.environment(None, tmp_path)))
    assert "must be one of" in answer["errors"][0]["message"] and answer["warnings"] == []


def test_a_pipeline_of_diffusers_comes_back(hub, tmp_path):
    push = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
unet = UNet2DModel(sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, **blocks)
for parameter in unet.parameters():
    torch.nn.init.constant_(parameter, 0.25)
pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
pipe.push_to_hub("alice/ddpm", private=True)
pipe.to(dtype=torch.float16).push_to_hub("alice/ddpm", variant="fp16")
"""
    run(push, hub.environment("hf_alice", tmp_path / "writer"))
    weights = {name for name in hub.files("alice/ddpm") if name.startswith("unet/diffusion_pytorch_model")}
    assert len(weights) == 2
    first = list(hub.repos["alice/ddpm"].commits)[1]
    load = f"""
import huggingface_hub
import torch
from diffusers import DiffusionPipeline
for offline in (False, True):
    huggingface_hub.constants.HF_HUB_OFFLINE = offline
    for arguments in ({{}}, {{"variant": "fp16", "torch_dtype": torch.float16}}, {{"revision": {first!r}}}):
        pipe = DiffusionPipeline.from_pretrained("alice/ddpm", **arguments)
        assert all((parameter == 0.25).all() for parameter in pipe.unet.parameters())
        print(type(pipe).__name__, pipe.scheduler.config.num_train_timesteps, pipe.unet.dtype)
"""
    names = [f"DDPMPipeline 10 torch.{dtype}" for dtype in ("float32", "float16", "float32")]
    assert run(load, hub.environment("hf_alice", tmp_path / "reader")).splitlines() == 2 * names
