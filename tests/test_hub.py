"""A model that is named by its hub id: what is fetched of it, how often, and what is said where it cannot be had."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import huggingface_hub
import pytest
from huggingface_hub import constants
from rich.console import Console

from crossdock.launch.cli import app
from crossdock.launch.commands.builtin_configs import CONFIGS
from crossdock.launch.commands.options import run_app
from crossdock.launch.engine.ranks import Ranks
from crossdock.launch.hub import blobs as blobs_module
from crossdock.launch.hub import fetch as fetch_module
from crossdock.launch.hub.fetch import fetch, pinned
from crossdock.launch.hub.locate import fetch_here, model_directory
from crossdock.launch.hub.names import HubName, hub_name, name_of_snapshot
from crossdock.launch.hub.progress import fetch_bar, fetch_lines
from crossdock.launch.hub.wanted import wanted_files
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError, LaunchError
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.tiny.recipes import SPEC_OF_RECIPE, TINY
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from hub_stand_in import BESIDE, COMMIT, LATER, REPO, Hub, point_to
from tiers import thorough

NAME = HubName(REPO)
CONFIG = str(CONFIGS / "single.yaml")


def _fetch(name: HubName = NAME, tell: Callable[[int, int], None] = lambda done, total: None) -> Path:
    return fetch(name, tell, lambda line: None)


def _used(hub: Hub) -> dict[str, int]:
    """Path -> bytes of what a run reads of the repository."""
    return {path: len(data) for path, data in hub.files.items() if path not in BESIDE}


def _found(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("acme/tiny-model", "acme/tiny-model", None),
        ("acme/FLUX.2_dev@main", "acme/FLUX.2_dev", "main"),
        ("acme/m@refs/pr/7", "acme/m", "refs/pr/7"),
    ],
)
def test_a_hub_id(text: str, repo: str, revision: str | None) -> None:
    name = hub_name(text)
    assert name == HubName(repo, revision)
    assert str(name) == text


@pytest.mark.parametrize(
    "path", ["tiny", "./acme/tiny", "/acme/tiny", "acme/tiny/x", "acme/tiny@", "acme/tiny@../x", "acme/../x", "~/x", ""]
)
def test_a_path_is_no_hub_id(path: str) -> None:
    assert hub_name(path) is None


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / REPO).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_name(REPO) is None
    assert model_directory(REPO, print) == Path(REPO)


def test_fresh(hub: Hub, flux2_dir: Path) -> None:
    """Every byte that a run reads comes once, and no other."""
    told: list[tuple[int, int]] = []
    directory = _fetch(tell=lambda done, total: told.append((done, total)))
    assert _found(directory) == {path: hub.files[path] for path in _used(hub)}
    assert hub.sent == _used(hub)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    weights = sum(size for path, size in _used(hub).items() if path.endswith(".safetensors"))
    assert told[0] == (0, weights)
    assert told[-1] == (weights, weights)
    assert name_of_snapshot(directory) == HubName(REPO, COMMIT)
    assert make_plan(RunConfig(), directory, "cpu").layout.stored.keys() == set(
        make_plan(RunConfig(), flux2_dir, "cpu").layout.stored
    )


@thorough
@pytest.mark.parametrize("recipe", TINY)
def test_every_family(recipe: str, hub: Hub, checkpoint_of: Callable[[str], Path]) -> None:
    """What is fetched makes the plan that the checkpoint makes, without what is not used."""
    folder = checkpoint_of(recipe)
    hub.files = Hub.of(folder).files
    directory = _fetch()
    assert make_plan(RunConfig(), directory, "cpu").memory == make_plan(RunConfig(), folder, "cpu").memory
    unused = tuple(f"{name}/" for name in SPEC_OF_RECIPE[recipe].unused)
    assert _found(directory).keys() == {path for path in _used(hub) if not path.startswith(unused)}
    assert not any(path.startswith((*BESIDE, *unused)) for path in hub.sent)


def test_weights_that_a_single_file_brings_are_not_fetched(hub: Hub) -> None:
    model_directory(REPO, print, without=RunConfig(transformer="mine.safetensors").single_files)
    assert "transformer/config.json" in hub.sent
    assert not [path for path in hub.sent if path.startswith("transformer/") and path.endswith(".safetensors")]
    assert [path for path in hub.sent if path.startswith("vae/") and path.endswith(".safetensors")]


def test_what_is_here_is_not_fetched_again(hub: Hub) -> None:
    directory = _fetch()
    hub.asked.clear()
    assert _fetch() == directory
    assert hub.asked == [("GET", f"/api/models/{REPO}", None)]  # what the branch is now
    hub.asked.clear()
    assert _fetch(HubName(REPO, COMMIT)) == directory
    assert hub.asked == []


def test_a_branch_that_went_on(hub: Hub) -> None:
    """The new commit's folder; what has not changed is not fetched again."""
    before = _fetch()
    hub.revisions |= {"main": LATER, LATER: LATER}
    hub.files["transformer/config.json"] += b"\n"
    hub.sent.clear()
    after = _fetch()
    assert after.name == LATER != before.name
    assert hub.sent.keys() == {"transformer/config.json"}
    assert pinned(HubName(REPO, "v1")).revision == COMMIT


@pytest.mark.parametrize("by", ["the network", "Ctrl-C"])
def test_resumed_after_a_cut_at_half(hub: Hub, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there of each file stays, also where the process ended: but for the chunks that were under way."""
    # one after the other: the cut is in the middle of one, and ends no other's fetch
    monkeypatch.setattr("crossdock.launch.hub.blobs._AT_ONCE", 1)
    size = sum(_used(hub).values())

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    if by == "Ctrl-C":
        with pytest.raises(KeyboardInterrupt):
            _fetch(tell=interrupt)
    else:
        hub.cut_after = size // 2
        with pytest.raises(LaunchError, match=rf"^{REPO}: .* cannot be reached .*what is there is kept"):
            _fetch()
    hub.cut_after = None
    hub.sent.clear()
    told: list[tuple[int, int]] = []
    directory = _fetch(tell=lambda done, total: told.append((done, total)))
    assert _found(directory) == {path: hub.files[path] for path in _used(hub)}
    came = sum(nbytes for path, nbytes in hub.sent.items() if path.endswith(".safetensors"))
    missing = told[0][1] - told[0][0]
    assert told[0][0] > 0
    assert 0.4 * size < missing < 0.6 * size
    assert by == "Ctrl-C" or came == missing  # what was on its way when it was pressed is sent to nobody, and counts
    assert any(asked[2] and asked[2] != "bytes=0-" for asked in hub.asked)
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.timeout(100)
def test_ctrl_c_while_nothing_comes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the network then."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
    hub.stalls, pressed = threading.Event(), threading.Event()

    def press(done: int, total: int) -> None:
        if done > 0.45 * total and not pressed.is_set():  # half of each file is there
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _fetch(tell=press)
    hub.stalls.set()


def test_what_came_is_what_the_repository_lists(hub: Hub) -> None:
    hub.corrupt = True
    with pytest.raises(CheckpointError, match=r"sha256 .* fetch it again"):
        _fetch()
    hub.corrupt = False
    assert _found(_fetch()) == {path: hub.files[path] for path in _used(hub)}


@pytest.mark.parametrize("more", [b"", b"x" * 10**6])
def test_what_was_cut_off_and_damaged_comes_anew(hub: Hub, more: bytes) -> None:
    hub.cut_after = sum(_used(hub).values()) // 2
    with pytest.raises(LaunchError):
        _fetch()
    hub.cut_after = None
    for part in Path(constants.HF_HUB_CACHE).rglob("*.incomplete"):
        part.write_bytes(b"x" + part.read_bytes()[1:] + more)
    told: list[tuple[int, int]] = []
    directory = _fetch(tell=lambda done, total: told.append((done, total)))
    assert _found(directory) == {path: hub.files[path] for path in _used(hub)}
    assert told[-1][0] == told[-1][1]


def test_several_at_once_fetch_once(hub: Hub) -> None:
    """As ranks of one node do that torchrun started."""
    said: list[str] = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(NAME, lambda done, total: None, said.append)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 4
    assert hub.sent == _used(hub)
    assert said
    assert set(said) == {f"{REPO}: another process of this machine fetches it; waiting"}


def test_nobody_waits_for_ever(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "FETCH_S", 0.0)
    cache = Path(constants.HF_HUB_CACHE)
    with (
        fetch_module._one_at_a_time(cache / ".locks", NAME, print),
        pytest.raises(LaunchError, match="another process of this machine has been fetching it for"),
    ):
        _fetch()


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_without_the_hub(hub: Hub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched is used; what was not, or not wholly, is refused with the way out."""
    directory = _fetch()
    hub.asked.clear()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        refusal = r"^{name}: is not, or not wholly, in .*, and HF_HUB_OFFLINE is set; connect once"
    else:
        point_to(monkeypatch, "http://127.0.0.1:9")
        refusal = r"^{name}: http://127.0.0.1:9 cannot be reached \(.*\), and it is not, or not wholly, in .*; connect"
    assert _fetch() == directory
    assert _fetch(HubName(REPO, COMMIT)) == directory
    for path in directory.glob("tokenizer/*.json"):
        path.unlink()
    with pytest.raises(LaunchError, match=refusal.format(name=REPO)):
        _fetch()
    (directory / "vae/diffusion_pytorch_model.safetensors").resolve().unlink()
    for name in (NAME, HubName(REPO, "v1"), HubName("acme/other")):
        with pytest.raises(LaunchError, match=refusal.format(name=name)):
            _fetch(name)
    assert hub.asked == []


def test_a_cache_that_another_version_filled(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the list of the repository's files; what is here is all there is."""
    directory = _fetch()
    shutil.rmtree(directory.parents[1] / "trees")
    monkeypatch.setattr(huggingface_hub._tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert _fetch() == directory


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.accepted = "hf_right"
    for token in (None, "hf_wrong"):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(
            CheckpointError, match=rf"is gated: accept its conditions at {hub.endpoint}/{REPO}, .*HF_TOKEN"
        ):
            _fetch()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert _found(_fetch()).keys() == _used(hub).keys()
    assert hub.tokens_given_away == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (HubName("acme/none"), r"^acme/none: no such directory, and no such model at http.*, or a private one; check"),
        (
            HubName(REPO, "v2"),
            rf"^{REPO}@v2: {REPO} has no revision v2; its branches, tags and commits: http.*/commits",
        ),
    ],
)
def test_missing(hub: Hub, name: HubName, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _fetch(name)


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_is_ill(hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(LaunchError, match=rf"^{REPO}: .*({status}|cannot be reached).*"):
        _fetch()


def test_a_disk_that_is_too_small(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before the first large byte."""
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(
        LaunchError, match=r"the disk of .* is full: \d+ bytes are missing, and 1000 are free; make room"
    ):
        _fetch()
    assert not any(path.endswith(".safetensors") for path in hub.sent)


def test_a_disk_that_is_full_meanwhile(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = blobs_module.http_get

    def full(url: str, file: Any, **options: Any) -> None:
        real(url, file, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blobs_module, "http_get", full)
    with pytest.raises(LaunchError, match=r"the disk of .* is full; make room, or set HF_HOME"):
        _fetch()


@pytest.mark.parametrize(
    ("keep", "more", "message"),
    [
        (
            lambda path: not path.startswith("transformer/d"),
            {"transformer/d.bin": b"x"},
            "python -c .*DiffusionPipeline",
        ),
        (lambda path: not path.startswith("transformer/d"), {"transformer/q.gguf": b"x"}, "python -c .*dequantize"),
        (lambda path: not path.startswith("transformer/d"), {}, "transformer: holds no safetensors files, nor other"),
        (lambda path: not path.startswith("tokenizer"), {}, "has no folder tokenizer, but its index lists"),
        (lambda path: False, {"a-Q4_K.gguf": b"x"}, "has no model_index.json.*GGUF.*python -c .*dequantize"),
        (lambda path: False, {"all.safetensors": b"x"}, "has no model_index.json: it is no pipeline"),
        (lambda path: True, {"model_index.json": b"[]"}, "expected a JSON object"),
        (lambda path: True, {"model_index.json": b'{"_class_name": "Own"}'}, "unknown model class 'Own'"),
    ],
)
def test_what_is_not_read_is_refused(
    hub: Hub, keep: Callable[[str], bool], more: dict[str, bytes], message: str
) -> None:
    """Before any weights are fetched."""
    hub.files = {path: data for path, data in hub.files.items() if path not in BESIDE and keep(path)} | more
    with pytest.raises(CheckpointError, match=message):
        _fetch()
    assert not any(path.endswith((".safetensors", ".bin", ".gguf")) for path in hub.sent)


def test_another_node_fetches_to_the_same_place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank under Ray does; where the folder is shared it finds all there."""
    directory = _fetch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    hub.asked.clear()
    fetch_here(None, directory)
    assert hub.asked == []
    shutil.rmtree(directory.parents[2])
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    fetch_here(None, directory)
    assert _found(directory).keys() == _used(hub).keys()
    fetch_here(None, directory / "transformer")  # no folder of the cache: a path that the user shares


def test_lines_and_a_bar() -> None:
    said: list[str] = []
    tell = fetch_lines("a/b", said.append)
    for done in range(0, 2001):
        tell(done * 10**6, 2 * 10**9)
    assert len(said) == 11
    assert said[3] == "a/b: fetching: 600.0 MB of 2.0 GB"
    for terminal in (True, False):
        out = StringIO()
        with fetch_bar("a/b", Console(file=out, force_terminal=terminal, width=100)) as tell:
            pass
        assert out.getvalue() == ""  # there was nothing to fetch
        with fetch_bar("a/b", Console(file=out, force_terminal=terminal, width=100)) as tell:
            tell(5 * 10**8, 10**9)
            tell(10**9, 10**9)
        assert ("1.0/1.0 GB" in out.getvalue()) == terminal
        assert ("a/b: fetching: 1.0 GB of 1.0 GB" in out.getvalue()) != terminal


def test_clients_of_a_server_call_the_model_by_its_id(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server = pytest.importorskip("crossdock.launch.serve.web.server", reason="needs the extra serve")
    asked: list[str | None] = []
    monkeypatch.setattr(server, "serve", lambda config, model_dir, start, options, notify: asked.append(options.name))
    for more in ([], ["--name", "mine"]):
        assert run_app(app, ["serve", f"{REPO}@v1", "--config", CONFIG, *more]) == 0
    assert asked == [REPO, "mine"]


@pytest.mark.parametrize("command", ["generate", "check", "serve"])
def test_the_command_line_says_it_once(hub: Hub, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    more = ["--prompt", "a fox"] if command == "generate" else []
    assert run_app(app, [command, "acme/none", "--config", CONFIG, *more]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("crossdock: error: acme/none: no such directory, and no such model at http")
    assert err.count("\n") == 1


_SHARDS = [f"transformer/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
_WHOLE = "transformer/diffusion_pytorch_model.safetensors"
_FP16 = ["transformer/diffusion_pytorch_model.fp16-00001-of-00001.safetensors"]
_FP16_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.fp16.json"


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ([_WHOLE], [_WHOLE]),
        ([_INDEX, *_SHARDS], [_INDEX, *_SHARDS]),
        ([_INDEX, *_SHARDS, _WHOLE], [_INDEX, *_SHARDS]),
        ([*_SHARDS, _WHOLE], [_WHOLE]),
        ([_INDEX, *_SHARDS, *_FP16, _FP16_INDEX], [_INDEX, *_SHARDS]),
        ([*_FP16, _FP16_INDEX], [*_FP16, _FP16_INDEX]),
        (
            ["transformer/model-00001-of-00001.fp16.safetensors", "transformer/model.bf16.safetensors"],
            ["transformer/model.bf16.safetensors"],
        ),
        ([_WHOLE, "transformer/flux-original.safetensors"], [_WHOLE]),
        (["transformer/flux.1-original.safetensors"], ["transformer/flux.1-original.safetensors"]),
        ([_WHOLE, "transformer/old/" + Path(_WHOLE).name, "transformer/a b.json", "transformer/../x.json"], [_WHOLE]),
    ],
)
def test_one_set_of_weights(there: list[str], wanted: list[str]) -> None:
    index = {"_class_name": "Any", "transformer": ["diffusers", "Transformer"], "safety_checker": [None, None]}
    spec = SPECS["flux2-klein"]
    found = wanted_files("a/b", [*there, "transformer/config.json", "transformer/x.py"], index, spec)
    assert found == sorted([*wanted, "transformer/config.json"])


def test_components_that_are_not_used_or_lie_elsewhere() -> None:
    spec = SPECS["minimax-h3"]
    assert spec.unused
    files = [f"{name}/{file}" for name in ("transformer", *spec.unused) for file in ("config.json", Path(_WHOLE).name)]
    entry = ["diffusers", "Any", {"repo": "a/b"}]
    index = {"transformer": entry, "text_encoder": entry} | dict.fromkeys(spec.unused, entry)
    assert wanted_files("a/b", files, index, spec) == ["transformer/config.json", _WHOLE]


def test_the_ranks_of_a_cluster_fetch_before_they_load(hub: Hub) -> None:
    """Each on its own node; also those that replace lost ones, on a node that had none."""
    asked: list[tuple[object, ...]] = []

    class Gang:
        can_restart, own_rank, world_size = False, None, 1

        def collective_rpc(self, *work: object, timeout_s: float) -> None:
            asked.append(work)
            raise LaunchError("far enough")

    for address, first in ((None, RankWorker.setup), ("10.0.0.1:6379", fetch_here)):
        config = RunConfig.parse({"launch": {"ray_address": address}})
        plan = make_plan(config, model_directory(REPO, print), "cpu")
        with pytest.raises(LaunchError, match="far enough"):
            Ranks(plan, cast(Any, Gang()), owns_gang=False, notify=print)._load()
        assert asked[-1][0] is first
