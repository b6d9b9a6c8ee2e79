#!/usr/bin/env python3
"""GPTQ of matrix products to 4 bits in blocks of 32: ONNX Runtime's and ours in turn, on the same samples and cores: wall times and scores.

    gptq.py --tool target/release/onnx-quant --zoo ../shared/zoo --peer PYTHON [--samples 128] [--limit 900] [--repeat 1] [--language-model DIR]

PYTHON is one with onnxruntime, onnx and PyTorch, which ONNX Runtime's `GPTQWeightOnlyQuantConfig` asks for. Theirs: symmetric, damping 0.01,
its own time without imports. Ours: GPTQ alone (`--recipe balanced`), and `best`, whole runs of the program. A peer that is not done after
--limit seconds is stopped, and the ratio is then a lower bound. The model is minilm, or with --language-model what smollm2.py wrote to DIR.
"""
import argparse, json, statistics, subprocess, sys, tempfile
from pathlib import Path

from peers import run

PEER = '''
import copy, glob, sys, time
import numpy as np, onnx, torch
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import GPTQWeightOnlyQuantConfig, MatMulNBitsQuantizer
model, feeds, out, samples = sys.argv[1:]
class Reader(CalibrationDataReader):
    def __init__(self): self.at, self.files = 0, sorted(glob.glob(feeds + "/*.npz"))[:int(samples)]
    def get_next(self):
        if self.at == len(self.files): return None
        self.at += 1
        return dict(np.load(self.files[self.at - 1]))
start = time.perf_counter()
q = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True, algo_config=GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader()))
q.process()
print(); print(time.perf_counter() - start, flush=True)
m = q.model.model if hasattr(q.model, "model") else q.model
onnx.save(m, out)
'''


def score(zoo, name, model, float_model):
    r = subprocess.run([sys.executable, zoo / 'zoo.py', 'score', name, model, '--json', '--float', float_model], capture_output=True, text=True)
    return {k: round(v, 4) for k, v in json.loads(r.stdout).items() if k not in ('bytes', 'seconds')} if r.returncode == 0 else 'does not load or run'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--peer', required=True); p.add_argument('--language-model')
    p.add_argument('--samples', default='128'); p.add_argument('--limit', type=float, default=900); p.add_argument('--repeat', type=int, default=1)
    o = p.parse_args(); zoo = Path(o.zoo).resolve()
    name, model = ('smollm2', Path(o.language_model).resolve() / 'smollm2-135m.onnx') if o.language_model else ('minilm', zoo / 'models/minilm-l6.onnx')
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); feeds = tmp / 'feeds'
        subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
        common = [o.tool, 'quantize', model, '--scheme', 'w4a16g32', '--data', feeds, '--samples', o.samples, '--progress', 'none']
        ours = {'gptq': ['--recipe', 'balanced'], 'best': ['--recipe', 'best']}
        times, theirs, stopped = {what: [] for what in ours}, [], False
        for _ in range(o.repeat):  # in turn, so that the machine's mood is shared
            for what, options in ours.items():
                times[what].append(run([*common, *options, '-o', tmp / f'{what}.onnx']) or sys.exit(f'ours, {what}: it fails'))
            try:
                peer = subprocess.run([o.peer, '-c', PEER, model, feeds, tmp / 'peer.onnx', o.samples], capture_output=True, text=True, timeout=o.limit, cwd=model.parent)
                if peer.returncode: sys.exit(peer.stderr[-2000:])
                theirs.append(float(peer.stdout.splitlines()[-1]))
            except subprocess.TimeoutExpired:
                stopped = True; theirs.append(o.limit)
        for what in ours:
            wall, cpu, memory = (statistics.median(x) for x in zip(*times[what]))
            print(f'ours, {what}: {wall:.1f} s wall, {cpu:.1f} s CPU, {memory:.0f} MB, score {score(zoo, name, tmp / f"{what}.onnx", model)}', flush=True)
        wall, mine = statistics.median(theirs), statistics.median(t[0] for t in times['gptq'])
        end = 'stopped unfinished' if stopped else f'score {score(zoo, name, tmp / "peer.onnx", model)}'
        print(f'ONNX Runtime: {wall:.1f} s wall = {"at least " if stopped else ""}{wall / mine:.1f} x, {end}', flush=True)


if __name__ == '__main__':
    main()
