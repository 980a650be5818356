"""llama.cpp in a process of its own, under a Python that has `llama-cpp-python` and perhaps nothing else.

`peer.py` starts this. Its first line on stdout is a JSON object, `{"version": ...}` or `{"error": ...}`.
"""

import argparse
import ctypes
import importlib
import json
import random
import sys
import time
from typing import Any

try:
    version: str = importlib.import_module("llama_cpp").__version__
    lib: Any = importlib.import_module("llama_cpp.llama_cpp")
except Exception as error:  # a missing package, or a library that does not fit this machine
    print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
    sys.exit(1)


quiet = lib.llama_log_callback(lambda *_: None)  # llama.cpp keeps only its address


def main() -> None:
    """Say that llama.cpp is here, then quantize a file, measure with one, or end."""
    parser = argparse.ArgumentParser(description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("check")
    job = jobs.add_parser("quantize")
    for name, kind in (("source", str), ("destination", str), ("type", str), ("threads", int)):
        job.add_argument(name, type=kind)
    job = jobs.add_parser("measure")
    for name, kind in (("file", str), ("threads", int), ("prompt", int), ("generate", int)):
        job.add_argument(name, type=kind)
    args = parser.parse_args()
    print(json.dumps({"version": version}), flush=True)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    if args.job == "quantize":
        quantize(args.source, args.destination, args.type, args.threads)
    elif args.job == "measure":
        measure(args.file, args.threads, args.prompt, args.generate)


def quantize(source: str, destination: str, kind: str, threads: int) -> None:
    """Write `source` as a file whose matrices are `kind`, as `llama-quantize` does."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    if lib.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source}")


def measure(file: str, threads: int, prompt: int, generate: int) -> None:
    """For each line on stdin one run, and a JSON object about it on stdout."""
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(file.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = prompt + generate
    params.n_batch = prompt
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        sys.exit(f"llama.cpp could not load {file}")
    n_tokens = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    ids = random.Random(0).choices(range(n_tokens), k=prompt + generate - 1)
    for _ in sys.stdin:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        moments = [time.perf_counter()]
        for part in (ids[:prompt], *([token] for token in ids[prompt:])):
            tokens = (lib.llama_token * len(part))(*part)  # a batch holds only its address
            if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(part))):
                sys.exit("llama.cpp could not run a batch")
            lib.llama_synchronize(context)
            moments.append(time.perf_counter())
        speeds = prompt / (moments[1] - moments[0]), (generate - 1) / (moments[-1] - moments[1])
        print(json.dumps(speeds), flush=True)


if __name__ == "__main__":
    main()
