#!/usr/bin/env bash
# Small models and texts of the fixtures as starting points.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p corpus/{wire,import,text,pipeline,convert}
cp ../../fixtures/models/*.onnx corpus/wire/ && cp ../../fixtures/models/*.onnx corpus/import/
for case in ../../fixtures/passes/*/*.oq; do
  name=$(basename "$(dirname "$case")")-$(basename "$case" .oq)
  cp "$case" "corpus/text/$name.oq" && cp "$case" "corpus/pipeline/$name.oq" && cp "$case" "corpus/convert/$name.oq"
  cargo run --quiet --release --manifest-path ../../Cargo.toml -- cat "$case" --to onnx -o "corpus/import/$name.onnx" && cp "corpus/import/$name.onnx" corpus/wire/
done
cp ../../fixtures/lint/*.oq corpus/convert/
