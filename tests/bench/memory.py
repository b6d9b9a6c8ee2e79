#!/usr/bin/env python3
"""What every way to learn takes of memory on the language model, within --max-memory and without a bound: one line per run.

    memory.py --tool target/release/onnx-quant --zoo ../shared/zoo --language-model DIR [--max-memory 4G] [--methods brecq,latent] [--free brecq,latent] [--ways model]

DIR is what smollm2.py wrote. Few samples and steps: what is held does not depend on how many steps there are; more
samples may take more, up to the bound. What does not fit, or fails, says why in its row. `blocks` learns block after block (--learn), `model` from what the whole model returns (--distill), holding one block's tape at
a time and running blocks anew on the way back. Methods of --free run without a bound as well, to tell what the bound costs in time.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

METHODS = ['brecq', 'scale-aware', 'lora-rounding', 'flexround', 'lrq', 'signround', 'latent', 'latent-stochastic', 'latent-settled', 'talr', 'q-galore', 'discquant']
WAYS = {'blocks': ('--learn', '{iterations=4, batch=4}'), 'model': ('--distill', '{iterations=2, batch=4}')}


def run(command, log):
    """Seconds and megabytes of `command`, or the last line that it says where it fails."""
    start = time.perf_counter()
    with open(log, 'w+') as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said); _, status, usage = os.wait4(process.pid, 0)
        said.seek(0); lines = said.read().splitlines()
    return f'{lines[-1] if lines else "it fails"} | |' if status else f'{time.perf_counter() - start:.0f} | {usage.ru_maxrss / 1000:.0f} |'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--language-model', required=True)
    p.add_argument('--max-memory', default='4G'); p.add_argument('--samples', default='8'); p.add_argument('--methods', default=','.join(METHODS)); p.add_argument('--free', default='')
    p.add_argument('--ways', default='none,blocks,model')
    o = p.parse_args(); zoo = Path(o.zoo).resolve(); model = Path(o.language_model).resolve() / 'smollm2-135m.onnx'
    print('| way | method | bound | seconds | MB |\n|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as tmp:
        feeds = Path(tmp) / 'feeds'
        subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', 'smollm2', '--out', feeds], check=True, stdout=subprocess.DEVNULL)
        common = [o.tool, 'quantize', model, '--scheme', 'w3a16g64', '--recipe', 'best', '--data', feeds, '--samples', o.samples, '--keep-float', 'node_linear_210', '--progress', 'none', '--fresh', '-o', Path(tmp) / 'out.onnx']
        for way, (option, settings) in {'none': (None, ''), **WAYS}.items():
            if way not in o.ways.split(','): continue
            for method in o.methods.split(',') if option else ['best']:
                for bound in [o.max_memory, *([None] if method in o.free.split(',') else [])]:
                    learn = [option, method + settings] if option else []
                    took = run([*common, *learn, *(['--max-memory', bound] if bound else [])], Path(tmp) / 'said')
                    print(f'| {way} | {method} | {bound or "none"} | {took}', flush=True)


if __name__ == '__main__':
    main()
