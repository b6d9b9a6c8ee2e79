#!/usr/bin/env python3
"""Quantizes the zoo's models and scores them against what they must reach.

    zoo.py --tool target/release/onnx-quant --zoo ../shared/zoo [--quick] [--only NAME] [--keep DIR] [--all] [--also PYTHON]

`--quick` leaves out the slow ones (ppocr-rec, minilm). The language model runs where its weights were made:
--lm DIR (see the zoo's smollm2.py). With `--also`, the Python of another version of ONNX Runtime, the files of these rows run there too (said as `also`), and what is asked of them holds there as well. `--all` adds rows that are known to fall short of what they should reach. Prints one line per model: float
metric, ours, SQNR, bytes, wall time and peak memory of the run.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

# Runs the scorer so that ONNX Runtime's sums do not saturate on processors without VNNI.
PROCESSOR = Path(__file__).resolve().parent / 'processor.py'
# name -> (model file, what the score must reach)
MODELS = {
    'digits-resnet': ('digits-resnet.onnx', lambda s: s['top1'] >= 0.988 and s['output_sqnr_db'] >= 32),
    'digits-mobilenet': ('digits-mobilenet.onnx', lambda s: s['top1'] >= 0.968 and s['output_sqnr_db'] >= 33.5),
    'efficientnet-lite0': ('efficientnet-lite0.onnx', lambda s: s['agree_with_float'] >= 0.875 and s['output_sqnr_db'] >= 17.8),
    'magika': ('magika.onnx', lambda s: s['top1'] >= 0.865),
    'ppocr-rec': ('ppocr-rec.onnx', lambda s: s['char_error_rate'] <= 0.10 and s['output_sqnr_db'] >= 10),
    'minilm': ('minilm-l6.onnx', lambda s: s['mrr'] >= 0.600 and s['cosine_to_float'] >= 0.955 and s['output_sqnr_db'] >= 9),
}
# The same with --recipe best: (name, scheme, what the score must reach)
BEST = [
    ('efficientnet-lite0', 'w8a8', lambda s: s['agree_with_float'] >= 0.93 and s['output_sqnr_db'] >= 22),
    ('digits-resnet', 'w8a8', lambda s: s['top1'] >= 0.988 and s['output_sqnr_db'] >= 35),
    ('digits-resnet', 'w4a4', lambda s: s['top1'] >= 0.984),
    ('digits-resnet', 'w2a8', lambda s: s['top1'] >= 0.979),
    ('magika', 'w8a8', lambda s: s['top1'] >= 0.876),
    ('minilm', 'w8a8', lambda s: s['mrr'] >= 0.622 and s['cosine_to_float'] >= 0.9985 and s['output_sqnr_db'] >= 24),
    ('ppocr-rec', 'w8a8', lambda s: s['char_error_rate'] <= 0.073),
    ('ppocr-rec', 'w4a8', lambda s: s['char_error_rate'] <= 0.09),
    ('minilm', 'w3a16g64', lambda s: s['cosine_to_float'] >= 0.97),
]
# What best does not reach.
SHORT = [
    ('efficientnet-lite0', 'w4a8', lambda s: s['agree_with_float'] >= 0.80),
    ('minilm', 'w4a16g32', lambda s: s['cosine_to_float'] >= 0.995),
    ('minilm', 'w4a16g32asym', lambda s: s['cosine_to_float'] >= 0.995),
]
# The language model, its head in float: (scheme, recipe, what the score must reach)
LANGUAGE = [
    ('w4a16g128', 'fast', lambda s: s['perplexity'] <= 74),
    ('w4a16g128', 'best', lambda s: s['perplexity'] <= 61 and s['kl_to_float'] <= 0.16),
    ('w4a16g32', 'best', lambda s: s['perplexity'] <= 60 and s['kl_to_float'] <= 0.11),
    ('w3a16g64', 'best', lambda s: s['kl_to_float'] <= 0.50),
    ('w8a8', 'best', lambda s: s['perplexity'] <= 57),
]
HEAD = 'node_linear_210'
SLOW = {'ppocr-rec', 'minilm'}


def measured(command):
    """Wall seconds, CPU seconds and peak resident megabytes of a command."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0: raise SystemExit(f'{command} failed: {status}')
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1.024 / 1000


def said(ok, row, score, taken):
    (name, scheme, recipe), (wall, cpu, peak) = row, taken
    print(f"{'ok  ' if ok else 'MISS'} {name:20s} {scheme} {recipe:8s} " + ' '.join(f'{k} {v:.5g}' for k, v in score.items()) + f' | {wall:.1f} s wall, {cpu:.1f} s CPU, {peak:.0f} MB', flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--quick', action='store_true')
    p.add_argument('--only'); p.add_argument('--keep'); p.add_argument('--lm'); p.add_argument('--all', action='store_true'); p.add_argument('--also'); p.add_argument('--extra', nargs=argparse.REMAINDER, default=[])
    o = p.parse_args(); zoo = Path(o.zoo).resolve(); script = zoo / 'zoo.py'; failed = []
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(o.keep or tmp); folder.mkdir(parents=True, exist_ok=True)
        runs = [(name, 'w8a8', 'balanced', good) for name, (_, good) in MODELS.items()] + [(name, scheme, 'best', good) for name, scheme, good in BEST + (SHORT if o.all else [])]
        for name, scheme, recipe, good in runs:
            if (o.only and name != o.only) or (o.quick and name in SLOW): continue
            feeds, out = folder / f'{name}.feeds', folder / f'{name}.q.onnx'
            if not feeds.exists(): subprocess.run([sys.executable, script, 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
            options = ['--scheme', scheme, '--recipe', recipe, '--progress', 'none', *o.extra]
            wall, cpu, peak = measured([o.tool, 'quantize', zoo / 'models' / MODELS[name][0], '--data', feeds, '-o', out, *options])
            for python in [sys.executable, *([o.also] if o.also else [])]:
                score = json.loads(subprocess.run([python, PROCESSOR, script, 'score', name, out, '--json'], check=True, capture_output=True, text=True).stdout)
                score.pop('seconds'); ok = good(score)
                said(ok, (name, scheme, recipe if python == sys.executable else f'{recipe}, also'), score, (wall, cpu, peak))
                if not ok: failed.append(f'{name} {scheme} {recipe}, by {python}')
        silero(o.tool, zoo, folder)
        if o.lm: failed += language_model(o, zoo, folder)
    if failed: sys.exit(f'below the line: {", ".join(failed)}')


def silero(tool, zoo, folder):
    """The model with `If` goes through and runs identically."""
    import numpy as np, onnxruntime as ort
    model, out = zoo / 'models/silero-vad.onnx', folder / 'silero.onnx'
    subprocess.run([tool, 'opt', str(model), '--pipeline', 'infer-shapes, fold-constants, eliminate-identity, drop-dead', '-o', str(out), '--progress', 'none'], check=True, stderr=subprocess.DEVNULL)
    rng = np.random.default_rng(0)
    for rate, n in ((16000, 512), (8000, 256)):
        feeds = {'input': rng.standard_normal((1, n)).astype(np.float32), 'state': np.zeros((2, 1, 128), np.float32), 'sr': np.array(rate, np.int64)}
        o = ort.SessionOptions(); o.log_severity_level = 3; o.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        a, b = (ort.InferenceSession(str(m), o, providers=['CPUExecutionProvider']).run(None, feeds) for m in (model, out))
        assert all(np.array_equal(x, y) for x, y in zip(a, b)), rate
    print('ok   silero-vad           imports, exports, runs identically at 16 and 8 kHz')


def language_model(o, zoo, folder):
    """The rows that fall short."""
    feeds, out, model, failed = folder / 'smollm2.feeds', folder / 'smollm2.q.onnx', Path(o.lm) / 'smollm2-135m.onnx', []
    if not feeds.exists(): subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', 'smollm2', '--out', feeds], check=True, stdout=subprocess.DEVNULL)
    for scheme, recipe, good in LANGUAGE:
        options = ['--scheme', scheme, '--recipe', recipe, '--keep-float', HEAD, '--progress', 'none', *o.extra]
        taken = measured([o.tool, 'quantize', model, '--data', feeds, '-o', out, *options])
        run = subprocess.run([sys.executable, PROCESSOR, zoo / 'zoo.py', 'score', 'smollm2', out, '--float', model, '--json'], check=True, capture_output=True, text=True)
        score = json.loads(run.stdout); score.pop('seconds'); ok = good(score)
        said(ok, ('smollm2', scheme, recipe), score, taken)
        if not ok: failed.append(f'smollm2 {scheme} {recipe}')
    return failed


if __name__ == '__main__':
    main()
