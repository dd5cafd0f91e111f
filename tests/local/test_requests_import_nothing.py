"""Threads that answer requests import nothing: a late import can fail without file descriptors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tinkex

SERVER = """
import sys, threading

found = []

def note(event, arguments):
    name = threading.current_thread().name
    if event == "import" and arguments[0] not in sys.modules and name.startswith("tinkex-"):
        found.append((arguments[0], name))

from tinkex.local.server import LocalServer, load_engine

sys.addaudithook(note)
with LocalServer(load_engine("deterministic")) as server:
    print(server.url, flush=True)
    sys.stdin.readline()
print(found)
"""

# The client runs in another process, so that its imports do not hide the server's.
CLIENT = """
import datetime, importlib.util, sys
import tinkex
from tinkex import types

datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
for wire in ("json", "protobuf"):
    with tinkex.ServiceClient(base_url=sys.argv[1], wire=wire) as service:
        trainer = service.create_lora_training_client("deterministic", rank=4)
        trainer.forward_backward([datum], "cross_entropy").result()
        trainer.forward([datum], "cross_entropy").result()
        trainer.optim_step(types.AdamParams()).result()
        path = trainer.save_state("a" + wire).result().path
        trainer.load_state(path).result()
        sampler = trainer.save_weights_and_get_sampling_client("b" + wire)
        sampler.sample(types.ModelInput.from_ints([1]), 2).result()
        rest = service.create_rest_client()
        run = rest.list_training_runs().result().training_runs[0].training_run_id
        rest.list_checkpoints(run).result()
        rest.search_sessions(types.SessionSearchRequest()).result()
        rest.get_weights_info_by_tinker_path(path).result()
        rest.get_checkpoint_archive_url(run, "weights/a" + wire).result()
        recipients = None
        if importlib.util.find_spec("pyrage") is not None:
            recipients = ["age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"]
        trainer.save_weights_external("c" + wire, age_encryption_recipients=recipients).result()
    with tinkex.AdminClient(base_url=sys.argv[1]) as admin:
        admin.get_audit_log(day=datetime.date(2026, 1, 2)).result()
"""


def test_no_thread_of_the_server_imports_a_module_during_a_request() -> None:
    root = str(Path(tinkex.__file__).resolve().parents[1])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert server.stdout is not None
    try:
        url = server.stdout.readline().strip()
        subprocess.run([sys.executable, "-c", CLIENT, url], check=True, cwd=root, timeout=60)
        found, _ = server.communicate("stop\n", timeout=30)
    finally:
        server.kill()
        server.wait()
    assert found == "[]\n"
