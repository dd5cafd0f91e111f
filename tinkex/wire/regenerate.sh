#!/bin/sh
# Regenerate tinker_public_pb2.py and .pyi from tinker_public.proto.
#
#     python -m pip install "grpcio-tools==1.62.3" && sh tinkex/wire/regenerate.sh [PYTHON [OUT]]
#
# This version, because code from protoc 25 runs without a warning on every protobuf runtime from
# 4.25 on; newer versions write a check into the module that refuses older runtimes.
set -eu
out=$(cd "${2:-"$(dirname "$0")/../.."}" && pwd)
cd "$(dirname "$0")/../.."
"${1:-python}" -m grpc_tools.protoc -I. --python_out="$out" --pyi_out="$out" \
    tinkex/wire/tinker_public.proto
# protoc writes bare Mappings, which mypy --strict refuses.
pyi="$out/tinkex/wire/tinker_public_pb2.pyi"
{ echo "# mypy: disable-error-code=type-arg"; cat "$pyi"; } > "$pyi.tmp"
mv "$pyi.tmp" "$pyi"
