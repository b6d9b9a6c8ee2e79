#!/usr/bin/env python3
"""Converts what other tools write: Brevitas' exports (QONNX and QCDQ), the files of NVIDIA's model optimizer (int8, fp8, rest in f16) and of AMD
Quark (XINT8, A8W8, A16W8; it compiles operators of its own with ninja and g++ when it starts, and is skipped with a line where that fails).

    peers.py --tool target/release/onnx-quant

Checked: every file is absorbed whole (no quantizer of the input is left as a node beside ours), is written again for onnx-qdq, qonnx and
tensorrt, or refused by a rule of the target; our run of it agrees with the tool's own result (PyTorch for Brevitas, ONNX Runtime
for the others), and ONNX Runtime's run of what is written for onnx-qdq does too.
"""
import argparse, contextlib, io, os, subprocess, sys, tempfile, warnings
from pathlib import Path

warnings.filterwarnings('ignore')
import numpy as np
import onnx
import onnxruntime as ort
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def silent():
    """Nothing of what other tools say, from C++ as well."""
    kept, null = [os.dup(1), os.dup(2)], os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1); os.dup2(null, 2)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()): yield
    finally:
        for fd, old in zip((1, 2), kept): os.dup2(old, fd); os.close(old)
        os.close(null)


def of_brevitas(tmp):
    """Weights of 4 and 3 bits, activations of 8 and 6, scales of any value."""
    import torch, brevitas.nn as qnn
    from brevitas.export import export_onnx_qcdq, export_qonnx

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.start = qnn.QuantIdentity(bit_width=8)
            self.conv = qnn.QuantConv2d(1, 8, 3, stride=2, weight_bit_width=4, bias=True)
            self.relu = qnn.QuantReLU(bit_width=6)
            self.head = qnn.QuantLinear(8 * 13 * 13, 10, weight_bit_width=3, bias=True)

        def forward(self, x):
            return self.head(self.relu(self.conv(self.start(x))).flatten(1))

    torch.manual_seed(0)
    net = Net().train()
    for _ in range(4): net(torch.rand(16, 1, 28, 28))
    net.eval(); x = torch.rand(4, 1, 28, 28)
    export_qonnx(net, args=x, export_path=str(tmp / 'brevitas-qonnx.onnx'))
    export_onnx_qcdq(net, args=x, export_path=str(tmp / 'brevitas-qcdq.onnx'))
    y = net(x).detach().numpy()
    return [(tmp / f'brevitas-{kind}.onnx', x.numpy(), y) for kind in ('qonnx', 'qcdq')]


def of_modelopt(tmp):
    from modelopt.onnx.quantization import quantize
    x = np.load(ROOT / 'fixtures/data/digits-eval.npz')['images'].astype(np.float32)[:64, None] / 255
    files = []
    for mode, precision in ('int8', 'fp32'), ('int8', 'fp16'), ('fp8', 'fp16'):
        out = tmp / f'modelopt-{mode}-{precision}.onnx'
        quantize(str(ROOT / 'fixtures/models/digits-resnet.onnx'), quantize_mode=mode, calibration_data={'input': x}, output_path=str(out), calibration_eps=['cpu'], high_precision_dtype=precision)
        files.append((out, x, run(out, x)))
    return files


QUARK = """
import sys, numpy as np
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import Config, get_default_config
model, samples, folder = sys.argv[1:]
class Reader:
    def __init__(self): self.rows = iter(np.load(samples)['x'])
    def get_next(self):
        row = next(self.rows, None)
        return None if row is None else {'input': row[None]}
for name in ('XINT8', 'A8W8', 'A16W8'):
    ModelQuantizer(Config(global_quant_config=get_default_config(name))).quantize_model(model, f'{folder}/quark-{name}.onnx', Reader())
"""


def of_quark(tmp):
    x = np.load(ROOT / 'fixtures/data/digits-eval.npz')['images'].astype(np.float32)[:32, None] / 255
    np.savez(tmp / 'quark.npz', x=x)
    # Its compiler is looked for on the path.
    path = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    command = [sys.executable, '-c', QUARK, str(ROOT / 'fixtures/models/digits-resnet.onnx'), str(tmp / 'quark.npz'), str(tmp)]
    try: done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=path, cwd=tmp)
    except subprocess.TimeoutExpired: return [], 'it did not come to an end in ten minutes'
    if done.returncode: return [], (done.stderr.strip().splitlines() or ['it failed'])[-1][:200]
    return [(file, x, run(file, x)) for file in sorted(tmp.glob('quark-*.onnx'))], None


def run(path, x):
    options = ort.SessionOptions(); options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def judge(tool, path, x, want, tmp):
    feed = tmp / 'feed.npz'; np.savez(feed, **{onnx.load(str(path)).graph.input[0].name: x})
    call = lambda *a: subprocess.run([tool, *map(str, a)], capture_output=True, text=True)
    ran = call('run', path, '--data', feed, '-o', tmp / 'out.safetensors')
    if ran.returncode: return False, f'it does not run: {ran.stderr.strip()[-300:]}'
    ours = next(iter(load_file(str(tmp / 'out.safetensors')).values())).reshape(want.shape)
    db = lambda y: 10 * np.log10((want ** 2).sum() / max(((want - y) ** 2).sum(), 1e-30))
    text, good = f'our run {db(ours):.0f} dB from its own', db(ours) > 35
    for target in 'onnx-qdq', 'qonnx', 'tensorrt':
        out = tmp / f'{path.stem}.{target}.onnx'
        done = call('convert', path, '--target', target, '-o', out)
        if done.returncode == 3:
            code = next(line for line in done.stderr.splitlines() if 'error[' in line).split(']')[0].split('[')[1]
            text += f'; {target} refused by {code}'; good &= target == 'tensorrt'
            continue
        good &= done.returncode == 0 and 'read back with the same codes and scales' in done.stdout + done.stderr
        if target == 'onnx-qdq' and done.returncode == 0:
            text += f'; {target} in ONNX Runtime {db(run(out, x)):.0f} dB'; good &= db(run(out, x)) > 35
        else:
            text += f'; {target}'
    return good, text


def main():
    p = argparse.ArgumentParser(); p.add_argument('--tool', required=True)
    tool, good = str(Path(p.parse_args().tool).resolve()), True
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        with silent():
            files = of_brevitas(tmp) + of_modelopt(tmp)
            quark, problem = of_quark(tmp)
        if problem: print(f'quark: skipped: {problem}')
        files += quark
        for path, x, want in files:
            ok, text = judge(tool, path, x, want, tmp)
            print(f'{path.stem}: {text}' + ('' if ok else '   FAILED'))
            good &= ok
    print('all passed' if good else 'FAILED')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
