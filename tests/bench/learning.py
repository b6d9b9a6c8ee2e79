#!/usr/bin/env python3
"""What rounding by data and learning by gradients add to rounding to nearest: scores on the zoo, time and peak memory, one line per run.

    learning.py --tool target/release/onnx-quant --zoo ../shared/zoo [--only NAME] [--methods "brecq;lrq"] [--schemes w2a8]
"""
import argparse, json, os, subprocess, sys, tempfile, time
from pathlib import Path

# Runs the scorer so that sums do not saturate on processors without VNNI.
PROCESSOR = Path(__file__).resolve().parents[1] / 'consumer/processor.py'
FILES = {'digits-resnet': 'digits-resnet.onnx', 'digits-mobilenet': 'digits-mobilenet.onnx', 'efficientnet-lite0': 'efficientnet-lite0.onnx',
         'minilm': 'minilm-l6.onnx', 'ppocr-rec': 'ppocr-rec.onnx'}
# Model, schemes, options of learning: small models take more steps in the same time.
RUNS = [('digits-resnet', ('w4a8', 'w4a4', 'w3a4', 'w2a4', 'w2a2', 'w2a16', 'w1a8', 'wfp4a8', 'we2m3a8'), 'iterations=400, batch=16'),
        ('digits-mobilenet', ('w4a8', 'w4a4', 'w3a8', 'w2a8'), 'iterations=400, batch=16'),
        ('minilm', ('w4a8', 'w4a4', 'w3a16g64', 'w2a16g32'), 'iterations=100, layers=6'),
        ('efficientnet-lite0', ('w4a8', 'w4a4', 'w3a8'), 'iterations=100'),
        ('ppocr-rec', ('w4a8', 'w4a4'), 'iterations=100')]
# What a method is called, and its options: rounding to nearest, GPTQ, the chain of the recipe best, and what goes on from there.
METHODS = {'nearest': ['--recipe', 'balanced', '--rounding', 'nearest'], 'gptq': ['--recipe', 'balanced', '--rounding', 'gptq'], 'adaround': ['--recipe', 'balanced', '--rounding', 'adaround'], 'best': ['--recipe', 'best'],
           'brecq': 'brecq{%s}', 'scale-aware': 'scale-aware{%s}', 'qdrop': 'brecq{%s, drop=0.5}', 'qdrop, inputs too': 'brecq{%s, drop=0.5, inputs=mixed}', 'brecq on mixed inputs': 'brecq{%s, inputs=mixed}', 'brecq on float inputs': 'brecq{%s, inputs=float}', 'brecq with scales of activations': 'brecq{%s, steps=1}', 'lora-rounding': 'lora-rounding{%s}',
           'flexround': 'flexround{%s}', 'lrq': 'lrq{%s}', 'signround': 'signround{%s}', 'latent': 'latent{%s}', 'latent-stochastic': 'latent-stochastic{%s}',
           'latent-settled': 'latent-settled{%s}', 'talr': 'talr{%s}', 'q-galore': 'q-galore{%s}',
           'cbq': 'lora-rounding{%s, layers=2, window=2, overlap=1}', 'cbq, hidden': 'lora-rounding{%s, layers=2, window=2, overlap=1, loss=hidden}', 'norms alone': 'latent{%s, codes=0, scales=0, biases=0, norms=2, loss=channels}', 'pd-quant': 'brecq{%s, drop=0.5, loss=pd}', 'pd-quant corrected': 'brecq{%s, drop=0.5, loss=pd, correct-distribution=1}', 'fisher': 'brecq{%s, loss=fisher}', 'fisher-each': 'brecq{%s, loss=fisher-each}',
           'brecq spared': 'brecq{%s, spare=1}', 'discquant': ('--distill', 'discquant{%s}'), 'distill': ('--distill', 'brecq{%s}')}


def run(command):
    """Seconds and megabytes of `command`."""
    start = time.perf_counter(); process = subprocess.Popen(command, stdout=subprocess.DEVNULL); _, status, usage = os.wait4(process.pid, 0)
    if status: sys.exit(f'{command} ended with {status}')
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--only')
    p.add_argument('--methods'); p.add_argument('--schemes'); o = p.parse_args()
    zoo = Path(o.zoo).resolve(); methods = list(METHODS) if o.methods is None else o.methods.split(';')
    print('| model | scheme | method | score | seconds | MB |\n|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        for name, schemes, options in RUNS:
            if o.only and name != o.only: continue
            feeds, out = Path(tmp) / f'{name}.feeds', Path(tmp) / f'{name}.onnx'
            subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
            for scheme in schemes:
                if o.schemes and scheme not in o.schemes.split(','): continue
                for method in methods:
                    how = METHODS[method]
                    how = ('--learn', how) if isinstance(how, str) else how
                    learn = ['--recipe', 'best', how[0], how[1] % options] if isinstance(how, tuple) else how
                    wall, memory = run([o.tool, 'quantize', zoo / 'models' / FILES[name], '--target', 'onnx-qdq', '--scheme', scheme, '--data', feeds, '-o', out, '--progress', 'none', *learn])
                    score = json.loads(subprocess.run([sys.executable, PROCESSOR, zoo / 'zoo.py', 'score', name, out, '--json', '--float', zoo / 'models' / FILES[name]], check=True, capture_output=True, text=True).stdout); score.pop('seconds')
                    print(f'| {name} | {scheme} | {method} | ' + ', '.join(f'{k} {v:.4g}' for k, v in score.items()) + f' | {wall:.1f} | {memory:.0f} |', flush=True)


if __name__ == '__main__':
    main()
