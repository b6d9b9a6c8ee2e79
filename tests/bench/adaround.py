#!/usr/bin/env python3
"""AdaRound of efficientnet-lite0 at w4a8: AIMET-ONNX's and ours in turn, on the same pictures and cores: wall times and scores, and our memory.

    adaround.py --tool target/release/onnx-quant --zoo ../shared/zoo --aimet PYTHON [--iterations 1000] [--repeat 1]

PYTHON is one with aimet-onnx and onnx (`pip install aimet-onnx`, which takes PyTorch along). Both get the model with batch norms folded,
as AIMET asks for. AIMET: symmetric 4-bit weights per channel, 8-bit activations by minimum and maximum, so many iterations per layer (it
advises 15,000 below 8 bits); its time is that of `apply_adaround` and of `compute_encodings`, without import of Python packages. Ours:
the whole run of the program, with `--rounding adaround` in the recipe `balanced` (which rounds layer by layer on second moments), and `best`.
"""
import argparse, json, statistics, subprocess, sys, tempfile
from pathlib import Path

from peers import run, score

FOLD = ('infer-shapes, fold-constants, *(eliminate-identity, fold-gemm-scalars, fold-batch-norm, fold-affine, fold-pad, fold-constants, '
        'infer-shapes, drop-dead)')
CONFIG = {'defaults': {'ops': {'is_output_quantized': 'True'}, 'params': {'is_quantized': 'True', 'is_symmetric': 'True'},
                       'per_channel_quantization': 'True', 'strict_symmetric': 'False', 'unsigned_symmetric': 'False'},
          'params': {'bias': {'is_quantized': 'False'}}, 'op_type': {},
          'supergroups': [{'op_list': ['Conv', 'Clip']}, {'op_list': ['Conv', 'Relu']}], 'model_input': {'is_input_quantized': 'True'}, 'model_output': {}}
PEER = '''
import glob, json, sys, time
import numpy as np, onnx, aimet_onnx
from aimet_onnx import QuantizationSimModel, apply_adaround, int4, int8
model, feeds, config, out, iterations = sys.argv[1:]
data = [dict(np.load(f)) for f in sorted(glob.glob(feeds + "/*.npz"))]
start = time.perf_counter()
sim = QuantizationSimModel(onnx.load(model), param_type=int4, activation_type=int8, config_file=config, providers=["CPUExecutionProvider"])
if int(iterations): apply_adaround(sim, data, int(iterations))
sim.compute_encodings(data)
print(json.dumps(time.perf_counter() - start))
onnx.save(sim.to_onnx_qdq(), out)
'''


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tool', required=True); p.add_argument('--zoo', required=True); p.add_argument('--aimet', required=True)
    p.add_argument('--iterations', default='1000'); p.add_argument('--repeat', type=int, default=1)
    o = p.parse_args(); zoo = Path(o.zoo).resolve(); name = 'efficientnet-lite0'
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); feeds, folded, config = tmp / 'feeds', tmp / 'folded.onnx', tmp / 'config.json'
        subprocess.run([sys.executable, zoo / 'zoo.py', 'feeds', name, '--out', feeds], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([o.tool, 'opt', zoo / 'models' / f'{name}.onnx', '--pipeline', FOLD, '-o', folded], check=True, stdout=subprocess.DEVNULL)
        config.write_text(json.dumps(CONFIG))
        common = [o.tool, 'quantize', folded, '--target', 'onnx-qdq', '--scheme', 'w4a8', '--data', feeds, '--progress', 'none']
        ours = {'balanced, adaround': ['--rounding', 'adaround'], 'best': ['--recipe', 'best']}
        times = {what: [] for what in [*ours, *o.iterations.split(',')]}
        for _ in range(o.repeat):  # in turn, so that the machine's mood is shared
            for what, options in ours.items():
                times[what].append(run([*common, *options, '-o', tmp / f'{what}.onnx']) or sys.exit(f'ours, {what}: it fails'))
            for n in o.iterations.split(','):
                peer = subprocess.run([o.aimet, '-c', PEER, folded, feeds, config, tmp / f'{n}.onnx', n], capture_output=True, text=True)
                if peer.returncode: sys.exit(peer.stderr[-2000:])
                times[n].append((float(peer.stdout.splitlines()[-1]),))
        for what in ours:
            wall, cpu, memory = (statistics.median(x) for x in zip(*times[what]))
            print(f'ours, {what}: {wall:.1f} s wall, {cpu:.1f} s CPU, {memory:.0f} MB, score {score(zoo, name, tmp / f"{what}.onnx")}', flush=True)
        mine = statistics.median(t[0] for t in times['balanced, adaround'])
        for n in o.iterations.split(','):
            wall = statistics.median(t[0] for t in times[n])
            print(f'AIMET, {n} iterations: {wall:.1f} s wall = {wall / mine:.1f} x, score {score(zoo, name, tmp / f"{n}.onnx")}', flush=True)


if __name__ == '__main__':
    main()
