#!/usr/bin/env python3
"""The zoo's language model in two bits with all that helps, by all of its calibration texts: perplexity and divergence, time and memory.

    two_bits.py --tool target/release/onnx-quant --zoo ../shared/zoo --language-model DIR [--variants 5] [--distill OPTIONS]

DIR holds what the zoo's smollm2.py wrote. The head stays in float. Half an hour to an hour on two cores; nothing else should run.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

SCHEME, HEAD = 'w2a16g32', 'node_linear_210'
PIPELINE = '''infer-shapes, expand-qoperators, absorb-qdq, fold-constants,
*(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, infer-shapes, drop-dead), split-gemm, drop-dead,
rotate, infer-shapes, drop-dead, calibrate, learn-scaling, drop-dead, calibrate, assign-encodings{weights=mse},
round-in-order{refit=3, coupled=4, damping=0.4, spare=1, lean=1}, distill{DISTILL}'''
# Samples per file.
RUN = 8


def texts(zoo, folder):
    """All calibration texts of the zoo, as files of samples."""
    sys.path.insert(0, str(zoo)); os.chdir(zoo)
    import numpy as np, zoo as scorer
    feeds = scorer.lm_feed(scorer.texts()['calib']); folder.mkdir()
    n = len(next(iter(feeds.values())))
    for at in range(0, n, RUN): np.savez(folder / f'{at:04d}.npz', **{name: ids[at:at + RUN] for name, ids in feeds.items()})
    return n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--language-model', required=True)
    p.add_argument('--variants', default='5'); p.add_argument('--distill', default='iterations=90, batch=10, rate=0.5, layers=1000'); o = p.parse_args()
    tool, zoo, model = Path(o.tool).resolve(), Path(o.zoo).resolve(), Path(o.language_model).resolve() / 'smollm2-135m.onnx'
    with tempfile.TemporaryDirectory() as tmp:
        feeds, out = Path(tmp) / 'feeds', Path(tmp) / 'q.onnx'; n = texts(zoo, feeds)
        command = [tool, 'quantize', model, '-o', out, '--target', 'ort-cpu', '--scheme', SCHEME, '--data', feeds, '--keep-float', HEAD, '--augment', o.variants]
        start = time.perf_counter()
        child = subprocess.Popen([*command, '--pipeline', PIPELINE.replace('DISTILL', o.distill)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status != 0: raise SystemExit(f'it failed: {status}')
        wall = time.perf_counter() - start
        score = json.loads(subprocess.run([sys.executable, zoo / 'zoo.py', 'score', 'smollm2', out, '--float', model, '--json'], check=True, capture_output=True, text=True).stdout)
        print(f"{SCHEME}, {n} texts with {o.variants} variants of each: " + ', '.join(f'{k} {v:.4g}' for k, v in score.items() if k != 'seconds') + f'; {wall / 60:.0f} minutes, {usage.ru_maxrss / 1e6:.1f} GB')


if __name__ == '__main__':
    main()
