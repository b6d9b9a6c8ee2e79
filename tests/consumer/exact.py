#!/usr/bin/env python3
"""Equalization leaves the function of every model of the zoo as it is, or as it is for the samples: ONNX Runtime's outputs before and after, in float.

    exact.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME] [--lm DIR]

Each pass runs alone, on 64 samples, and nothing is quantized. Checked on four files of samples, which are among these, and, where a model
reads floats and the pass is to be exact for all of them, on noise, on noise a hundred times as large and on zeros. For every output the largest
difference is at most 1e-5 of the largest value (float sums are reassociated), or no more than twice what ONNX Runtime's own optimizer changes in
the float model where that is more. A pass that finds nothing to do in any model fails too, where all models were run. silero-vad, which needs no
samples and has no data, `smooth-caches`, which needs a decoder with caches (see cache.py), and `fit-clamps`, which goes by encodings, are not among
these.
"""
import argparse, glob, json, subprocess, sys, tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from zoo import MODELS

PASSES = [('smooth', 'w8a8'), ('scale-outliers', 'w8a8'), ('equalize-layers', 'w4a8'), ('equalize-layers{clamps=1}', 'w4a8'), ('equalize-layers{from=weights}', 'w8a8'), ('equalize-layers{from=weights, clamps=exact}', 'w8a8'), ('relax-clamps', 'w8a8'), ('absorb-high-bias', 'w8a8'), ('reparameterize-norms{strength=1}', 'w8a8'), ('awq', 'w4a16g32'), ('learn-scaling{sweeps=1}', 'w4a16g32'), ('learn-scaling{sweeps=1}', 'w4a4'), ('rotate', 'w4a16g32'), ('learn-rotation{sweeps=1}', 'w4a16g32'), ('rotate-heads', 'w4a16g32'), ('rotate-bottlenecks', 'w4a8'), ('pool-to-conv', 'w8a8'), ('rotate-inputs', 'w4a4'), ('reparameterize-norms{to=bare}', 'w4a4'), ('defer-softmax', 'w4a4')]
# The function stays what it was on samples only.
ON_SAMPLES = {'equalize-layers{clamps=1}', 'relax-clamps', 'absorb-high-bias'}
# Found in decoders alone.
OF_DECODERS = {'rotate', 'learn-rotation{sweeps=1}'}
PLAIN = 'infer-shapes, absorb-qdq, fold-constants, *(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead)'


def outputs(path, feeds, optimized=False):
    o = ort.SessionOptions(); o.log_severity_level = 3
    if not optimized: o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    s = ort.InferenceSession(str(path), o, providers=['CPUExecutionProvider'])
    return [s.run(None, f) for f in feeds]


def distance(a, b):
    return max((float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for p, q in zip(a, b) for x, y in zip(p, q)), default=0.0)


def noise(feeds):
    """What no sample looks like, where all that is read are floats."""
    if any(x.dtype != np.float32 for x in feeds[0].values()): return []
    rng = np.random.default_rng(0)
    return [{name: (size * rng.standard_normal(x.shape)).astype(np.float32) for name, x in feeds[0].items()} for size in (1, 100, 0)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--only'); p.add_argument('--lm'); o = p.parse_args()
    zoo = Path(o.zoo).resolve(); failed, fired = [], set()
    models = {name: zoo / 'models' / file for name, (file, _) in MODELS.items()}
    if o.lm: models['smollm2'] = Path(o.lm) / 'smollm2-135m.onnx'
    for name, model in models.items():
        if o.only and name != o.only: continue
        with tempfile.TemporaryDirectory() as tmp:
            data, out, plain = (Path(tmp) / n for n in ('feeds', 'after.onnx', 'before.onnx'))
            subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', data], check=True, stdout=subprocess.DEVNULL)
            feeds = [dict(np.load(f)) for f in sorted(glob.glob(str(data / '*.npz')))[:4]]
            run = lambda text, to, scheme: json.loads(subprocess.run([o.tool, 'quantize', str(model), '--data', str(data), '--samples', '64', '--scheme', scheme, '--pipeline', text, '-o', str(to), '--progress', 'none', '--json'], check=True, capture_output=True, text=True).stdout)
            run(PLAIN, plain, 'w8a8')
            any_feeds = noise(feeds); feeds_of = lambda step: feeds + ([] if step in ON_SAMPLES else any_feeds)
            want = outputs(plain, feeds + any_feeds); allowed = [max(1e-5, 2 * distance([a], [b])) for a, b in zip(want, outputs(plain, feeds + any_feeds, True))]
            for step, scheme in PASSES:
                run(f'{PLAIN}, calibrate, {step}, drop-dead', out, scheme)
                found = [distance([a], [b]) for a, b in zip(want, outputs(out, feeds_of(step)))]; changed = out.read_bytes() != plain.read_bytes()
                d, most = max(zip(found, allowed), key=lambda pair: pair[0] / pair[1]); ok = d <= most
                if changed: fired.add(step)
                print(f"{'ok  ' if ok else 'MISS'} {name:20s} {step:34s} largest difference {d:.1e} of {most:.1e}{'' if changed else ' (found nothing to do)'}", flush=True)
                if not ok: failed.append(f'{name} {step}')
    if failed: sys.exit(f'the function changed: {", ".join(failed)}')
    idle = {step for step, _ in PASSES} - fired - (set() if o.lm else OF_DECODERS)
    if idle and not o.only: sys.exit(f'found nothing to do in any model: {", ".join(sorted(idle))}')


if __name__ == '__main__':
    main()
