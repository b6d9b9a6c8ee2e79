#!/usr/bin/env python3
"""Whether products of bytes saturate in ONNX Runtime here, and a way around it for scripts that measure something else.

    processor.py SCRIPT ARGUMENTS...

ONNX Runtime 1.22 hands the memory of tensors of 4 bits on to larger ones and writes beyond it (the heap is corrupted, or numbers are; 1.31 does not): its
sessions are told not to use memory again.

Processors with AVX2 and without VNNI add two products of bytes in 16 bits, which saturate where weights use all of theirs. `--cpu avx2` makes
models for them. Run through this file a script has ONNX Runtime compute exactly instead (session.x64quantprecision).
"""
import runpy, sys
from pathlib import Path

FLAGS = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
SATURATES = 'avx2' in FLAGS and 'vnni' not in FLAGS
# What `quantize` is told of this processor.
CPU = ['--cpu', 'avx2'] if SATURATES else []


def exactly(options):
    """`options` of a session, so that it does not saturate, and keeps tensors of 4 bits apart from others."""
    import onnxruntime as ort
    if tuple(map(int, ort.__version__.split('.')[:2])) <= (1, 22): options.enable_mem_reuse = False
    if SATURATES: options.add_session_config_entry('session.x64quantprecision', '1')
    return options


def main():
    import onnxruntime as ort
    session = ort.InferenceSession
    ort.InferenceSession = lambda model, sess_options=None, *rest, **more: session(model, exactly(sess_options or ort.SessionOptions()), *rest, **more)
    script = sys.argv[1]; sys.argv = sys.argv[1:]; sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
