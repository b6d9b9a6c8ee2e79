#!/usr/bin/env bash
# Small models and texts of the fixtures as starting points.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p corpus/{wire,import,text,pipeline}
cp ../../fixtures/passes/*/*.oq corpus/text/ && cp ../../fixtures/passes/*/*.oq corpus/pipeline/
cp ../../fixtures/models/*.onnx corpus/wire/ && cp ../../fixtures/models/*.onnx corpus/import/
for case in ../../fixtures/passes/*/*.oq; do
  name=$(basename "$(dirname "$case")")-$(basename "$case" .oq)
  cargo run --quiet --release --manifest-path ../../Cargo.toml -- cat "$case" --to onnx -o "corpus/import/$name.onnx" && cp "corpus/import/$name.onnx" corpus/wire/
done
