"""The generated module is up to date, and works beside the official SDK's in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tinkex.wire
from tinkex.wire import tinker_public_pb2 as pb

FOLDER = Path(tinkex.wire.__file__).parent
GENERATED = ("tinker_public_pb2.py", "tinker_public_pb2.pyi")


def test_the_generated_module_is_current(tmp_path):
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools==1.62.3")
    script = str(FOLDER / "regenerate.sh")
    subprocess.run(["sh", script, sys.executable, str(tmp_path)], check=True, timeout=60)
    for name in GENERATED:
        fresh = (tmp_path / "tinkex" / "wire" / name).read_text()
        assert fresh == (FOLDER / name).read_text(), f"run {script}"


def test_the_generated_module_requires_no_particular_runtime():
    # Code from newer compilers refuses runtimes older than the compiler.
    assert "runtime_version" not in (FOLDER / GENERATED[0]).read_text()


def test_another_package_may_define_the_same_protobuf_names():
    # The official SDK registers a file of this name, whose package is tinker_public.
    script = (
        "from google.protobuf import descriptor_pb2, descriptor_pool\n"
        "theirs = descriptor_pb2.FileDescriptorProto(\n"
        "    name='tinker_public.proto', package='tinker_public')\n"
        "theirs.message_type.add(name='ForwardBackwardRequest')\n"
        "descriptor_pool.Default().Add(theirs)\n"
        "from tinkex.wire.proto_codec import PROTOBUF\n"
        "assert PROTOBUF.decode_samples(b'').sequences == []\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_field_numbers_that_no_golden_vector_shows():
    def numbers(message):
        return {field.name: field.number for field in message.DESCRIPTOR.fields}

    assert numbers(pb.SampleResponse) == {
        "sequences": 1,
        "prompt_logprobs": 2,
        "topk_prompt_logprobs": 3,
        "prompt_cache_hit_tokens": 4,
        "target_prompt_logprobs": 5,
        "prompt_alt_tokens": 6,
    }
    assert numbers(pb.Chunk) == {"encoded_text": 1, "image": 2, "dmel": 3}
    assert numbers(pb.ImageChunk)["override_dimensions"] == 4
    assert numbers(pb.SampledSequence)["topk_sampled_logprobs"] == 4
    assert numbers(pb.PromptAltTokens) == {"tokens": 1, "logprobs": 2}
    assert numbers(pb.SamplingParams) == {
        "max_tokens": 1,
        "seed": 2,
        "temperature": 3,
        "top_k": 4,
        "top_p": 5,
        "stop_strs": 6,
        "stop_tokens": 7,
    }
    assert numbers(pb.ArrayRecord)["type_tag"] == 1
    assert dict(pb.DType.items()) == {
        "DTYPE_UNSPECIFIED": 0,
        "FLOAT32": 1,
        "INT64": 2,
        "INT32": 3,
        "BFLOAT16": 4,
    }
