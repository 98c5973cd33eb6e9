"""A plain vLLM server for real, on a CPU; and tests against a pretended server, which need no vLLM."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import requests
from engines import GRPO, QUIET, asks, draws, follows, mismatches, move, run, same
from omegaconf import OmegaConf

from segrl import serve
from segrl.rollout import vllm_server
from segrl.rollout.shared_prefix import SharedPrefixEngine
from segrl.rollout.vllm_server import VLLMServer
from segrl.runs.configuration import asset

LENGTH = 80
KILLED = """
import os, sys
from segrl.runs.configuration import asset
from segrl.models.hf_vlm import HFPolicy
from segrl.rollout.vllm_server import VLLMServer
from segrl.rollout.vllm_weights import PolicyWeights

class Dying(PolicyWeights):
    def __iter__(self):
        for name, value in super().__iter__():
            yield name, value
            if self.declared and "layers.1.mlp.gate_proj" in name:  # half of what vLLM joins
                os._exit(9)

if __name__ == "__main__":
    policy = HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False)
    engine = VLLMServer(80, 400, [sys.argv[1]], 60)
    engine.link, engine.pushed = engine._open(policy), "known"
    engine.link.source = Dying(policy, policy.pass_dtype)
    engine._fill(policy, "new", "known")
"""


class Pretended(BaseHTTPRequestHandler):
    """Stands for a server: says which weights it holds, until it is given others."""

    held, told = "default", []

    def do_GET(self):  # noqa: N802 - the library's name
        self.send_response(200 if self.path == "/weight_info" else 500)
        self.end_headers()
        self.wfile.write(json.dumps({"weight_version": Pretended.held}).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def pretended(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    server = HTTPServer(("127.0.0.1", 0), Pretended)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_rank_without_a_server_of_its_own_waits_for_the_one_that_fills_it(pretended, monkeypatch):
    engine = VLLMServer(8, 64, [pretended], 30)
    monkeypatch.setattr(VLLMServer, "_rank", 1)
    Pretended.held = "old"
    threading.Timer(0.5, setattr, (Pretended, "held", "new")).start()
    began = time.monotonic()
    engine._follow(None, "new", began + 30)
    assert time.monotonic() - began >= 0.4
    with pytest.raises(ValueError, match=r"must receive this run's weights within 30 s; .* is still new"):
        engine._follow(None, "newer", time.monotonic() + 0.5)
    filled = []
    monkeypatch.setattr(
        vllm_server, "_GRACE", 0.5
    )  # the first is done and waits elsewhere: it is the next one's turn
    monkeypatch.setattr(
        VLLMServer, "_fill", lambda *given: filled.append(given[3]) or setattr(Pretended, "held", "newer")
    )
    engine._follow(None, "newer", time.monotonic() + 30)
    assert filled == ["new"]


def test_what_another_writes_is_left_alone_until_the_writer_seems_dead(pretended, monkeypatch):
    engine = VLLMServer(8, 64, [pretended], 30)
    engine.pushed, Pretended.held = "old", vllm_server._UNFINISHED
    monkeypatch.setattr(vllm_server, "_ABANDONED", 1.0)
    monkeypatch.setattr(VLLMServer, "_fill", lambda *given: setattr(Pretended, "held", "new"))
    began = time.monotonic()
    engine._follow(None, "new", began + 30)
    assert time.monotonic() - began >= 1.0


def test_more_servers_than_ranks_are_refused(pretended):
    with pytest.raises(ValueError, match=r"rollout.servers: must be at most one per rank \(1\); got 2"):
        VLLMServer(8, 64, [pretended, pretended], 30)._check(None)


def test_what_a_server_refuses_is_told_in_one_line(pretended):
    engine = VLLMServer(8, 64, [pretended], 30)
    with pytest.raises(ValueError, match=r"rollout.servers: http.*/server_info.* answers 500: "):
        engine._check(None)


NO_ADDRESSES = [
    ["127.0.0.1:8000"], ["ftp://there:8000"], ["http://there"], ["http://there:80x"], ["http://there:99999"],
    [], None, "http://there:8000",
]  # fmt: skip


@pytest.mark.parametrize("servers", NO_ADDRESSES)
def test_text_that_is_no_address_is_refused(pretended, servers):
    with pytest.raises(ValueError, match="rollout.servers: .*must be .*http://HOST:PORT; got "):
        VLLMServer(8, 64, servers, 30)
    with pytest.raises(ValueError, match="rollout.servers: .*must be .*http://HOST:PORT; got "):
        serve.flags(composed(servers), "cpu")


def composed(servers, max_prefix=300):
    rollout = {"_target_": "X", "servers": servers, "max_prefix": max_prefix, "max_tokens": 100}
    return OmegaConf.create(
        {
            "rollout": rollout,
            "trainer": {"precision": "bf16-mixed"},
            "policy": {"dtype": "float32", "weights": asset("policy_nano")},
        }
    )


def test_a_server_gets_the_settings_of_the_run():
    flags = serve.flags(composed(["http://there:8123", "http://elsewhere:8000"]), "cuda")
    told = dict(zip(flags[::2], flags[1::2], strict=False))
    assert (told["--port"], told["--host"]) == ("8123", "127.0.0.1")
    assert " ".join(flags).count("--dtype bfloat16 ") == 1 and "--max-model-len 400 " in " ".join(flags)
    assert flags[-1] == '{"backend": "nccl"}'
    long = serve.flags(composed(["http://there:8123"], 2048), "cpu")
    assert "--max-model-len 2048 " in " ".join(long)  # the policy has no more positions
    assert " ".join(long).endswith("--no-enable-chunked-prefill --max-num-batched-tokens 32768")


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=f"rollout.servers: must name a free port; 127.0.0.1:{port}: "):
            serve.check_port(["--host", "127.0.0.1", "--port", "1", "--other", "--port", port])


def test_vllms_flags_in_front_of_the_dashes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve", "+experiment=demo", "--gpu-memory-utilization", "0.3"])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert "vLLM's flags must follow --; got --gpu-memory-utilization" in capsys.readouterr().err


def test_a_server_that_another_run_took_is_not_taken_back(pretended):
    engine = VLLMServer(8, 64, [pretended], 30)
    engine.known = engine.pushed = "mine"
    Pretended.held = "theirs"
    with pytest.raises(
        ValueError, match="must be used by one run alone; another has written its weights to http"
    ):
        engine._follow(None, "new", time.monotonic() + 5)


def test_a_fingerprint_changes_with_every_weight(nano_policy, nano_weights):
    from segrl.models.hf_vlm import HFPolicy

    first = nano_policy("qwen2_5_vl").fingerprint()
    weights = str(nano_weights("qwen2_5_vl"))
    again = HFPolicy(weights, 112, None, 1.0, "float32", None, False, False)
    assert again.fingerprint() == first
    for parameter in again.parameters():  # as an optimizer's step would
        parameter.data.add_(1e-5)
        moved = again.fingerprint()
        assert moved != first
        first = moved
    ranks = [
        HFPolicy(weights, 112, None, 1.0, "float32", {"rank": 4, "alpha": alpha, "dropout": 0.0}, False,
                 False) for alpha in (8, 16)
    ]  # fmt: skip
    assert ranks[0].fingerprint() != ranks[1].fingerprint()


def test_a_run_that_samples_elsewhere_needs_no_server():
    done = subprocess.run(
        [sys.executable, "-m", "segrl.serve", "+experiment=demo", "--", "--enforce-eager"],
        capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 2
    assert "must be vllm_server" in done.stderr or "--extra vllm" in done.stderr


def test_an_environment_in_which_vllm_cannot_list_its_packages_is_refused(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^PATH: must contain the folder of uv"):
        serve.check_packages_can_be_listed()
    (tmp_path / "uv").touch(mode=0o755)
    serve.check_packages_can_be_listed()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def started(port, log):
    """Start `segrl.serve` in a process of its own and wait until it is ready."""
    command = [
        sys.executable, "-m", "segrl.serve", "+experiment=demo", "rollout=vllm_server",
        f"rollout.servers=[http://127.0.0.1:{port}]", f"rollout.max_tokens={LENGTH}",
        "rollout.max_prefix=400", "--", "--enforce-eager",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env={**os.environ, **QUIET}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(f"http://127.0.0.1:{port}/health", timeout=5).ok:
                return process
        except requests.ConnectionError:
            time.sleep(1)
    raise AssertionError("vLLM's server did not start")


def end(process):
    os.killpg(process.pid, 9)
    process.wait()


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """Return the server's process, its port, and a function that starts another in its place."""
    port = free_port()
    with (tmp_path_factory.mktemp("vllm") / "log").open("w") as log:
        held = {"start": lambda: held.update(now=started(port, log)), "port": port}
        held["start"]()
        yield held
        end(held["now"])


@pytest.fixture(scope="module")
def server(process):
    return f"http://127.0.0.1:{process['port']}"


@pytest.fixture
def policy():
    from segrl.models.hf_vlm import HFPolicy

    return HFPolicy(asset("policy_nano"), 128, None, 1.0, "float32", None, True, False).eval()


@pytest.mark.vllm
def test_a_server_follows_its_policy(server, policy, scenes):
    drawn = follows(VLLMServer(LENGTH, 400, [server], 60), policy, asks(policy, scenes), LENGTH)
    assert bool(drawn.finished.any())


@pytest.mark.vllm
def test_a_server_that_was_left_half_written_is_filled_anew(server, policy, scenes, monkeypatch):
    """Its trainer was killed in the middle of a layer; the next trainer starts over."""
    monkeypatch.setattr(vllm_server, "_ABANDONED", 1.0)
    done = subprocess.run([sys.executable, "-c", KILLED, server], env={**os.environ, **QUIET}, timeout=200)
    assert done.returncode == 9
    held = vllm_server._Server(server, 60).get("weight_info")["weight_version"]
    assert held == vllm_server._UNFINISHED
    same(
        VLLMServer(LENGTH, 400, [server], 60).greedy(policy, asks(policy, scenes)),
        SharedPrefixEngine(LENGTH).greedy(policy, asks(policy, scenes)),
    )


@pytest.mark.vllm
def test_two_runs_with_one_server_do_not_learn_from_each_others_completions(
    server, policy, scenes, monkeypatch
):
    engine = VLLMServer(LENGTH, 400, [server], 60)
    monkeypatch.setattr(
        engine, "_follow", lambda *_: None
    )  # as if the other wrote just after this one looked
    engine._server.post("update_weight_version", new_version="the other's")
    with pytest.raises(ValueError, match="must be used by one run alone; another has written"):
        engine.greedy(policy, asks(policy, scenes))
    monkeypatch.undo()
    draws(engine, policy, asks(policy, scenes))  # with its own weights in it again


@pytest.mark.vllm
def test_a_server_with_other_settings_is_refused(server, policy, scenes):
    with pytest.raises(
        ValueError, match=r"must read 580 tokens \(rollout.max_prefix \+ rollout.max_tokens\); it reads 480"
    ):
        VLLMServer(LENGTH, 500, [server], 60).greedy(policy, asks(policy, scenes))
    policy.model.bfloat16()
    with pytest.raises(
        ValueError,
        match=r"must have dtype \(trainer.precision, policy.dtype\) torch.bfloat16; it has torch.float32",
    ):
        VLLMServer(LENGTH, 400, [server], 60).greedy(policy, asks(policy, scenes))


@pytest.mark.vllm
def test_two_ranks_learn_from_what_one_server_sampled(server, tmp_path):
    run([*GRPO, "rollout=vllm_server", f"rollout.servers=[{server}]", f"paths.run={tmp_path}/run"], tmp_path)
    assert 0 < max(mismatches(tmp_path / "run")) < 1e-3


@pytest.mark.slow
@pytest.mark.vllm
def test_two_ranks_fill_and_ask_a_server_each(server, tmp_path):
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        other = started(port, log)
        try:
            servers = f"rollout.servers=[{server},http://127.0.0.1:{port}]"
            run([*GRPO, "rollout=vllm_server", servers, f"paths.run={tmp_path}/run"], tmp_path)
        finally:
            end(other)
    assert 0 < max(mismatches(tmp_path / "run")) < 1e-3
    said = (tmp_path / "log").read_text()
    assert said.count("POST /inference/v1/generate") > 3 and said.count("POST /finish_weight_update") > 1


@pytest.mark.slow
@pytest.mark.vllm
def test_a_server_that_is_killed_and_started_anew_goes_unnoticed(process, server, policy, scenes):
    engine, ours = VLLMServer(LENGTH, 400, [server], 200), SharedPrefixEngine(LENGTH)
    same(engine.greedy(policy, asks(policy, scenes)), ours.greedy(policy, asks(policy, scenes)))
    end(process["now"])
    other = threading.Timer(5, process["start"])
    other.start()
    same(engine.greedy(policy, asks(policy, scenes)), ours.greedy(policy, asks(policy, scenes)))
    move(policy)
    same(engine.greedy(policy, asks(policy, scenes)), ours.greedy(policy, asks(policy, scenes)))
    other.join()
