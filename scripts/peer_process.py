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
from pathlib import Path
from typing import Any

POINTER, TEXT, SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
MANY_LAYERS = 999  # more than a model has; the head is one too, and stays here where it is shared

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
    job.add_argument("--workers", nargs="*", default=[], metavar="HOST:PORT")
    job.add_argument("--split", choices=["layer", "tensor"], default="layer")
    job.add_argument("--micro-batch", type=int)
    job = jobs.add_parser("serve")
    job.add_argument("address")
    args = parser.parse_args()
    print(json.dumps({"version": version}), flush=True)
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    if args.job == "quantize":
        quantize(args.source, args.destination, args.type, args.threads)
    elif args.job == "measure":
        measure(args)
    elif args.job == "serve":
        serve(args.address)


def quantize(source: str, destination: str, kind: str, threads: int) -> None:
    """Write `source` as a file whose matrices are `kind`, as `llama-quantize` does."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = threads
    if lib.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source}")


def ggml(library: str, function: str, result: Any, *arguments: Any) -> Any:
    """A function of the libraries below llama.cpp, which llama-cpp-python does not name."""
    folder = Path(importlib.import_module("llama_cpp").__file__ or "").with_name("lib")
    (file,) = [*folder.glob(f"lib{library}.so"), *folder.glob(f"lib{library}.dylib")] or [None]
    if file is None:
        sys.exit(f"this llama-cpp-python was built without {library} (CMAKE_ARGS=-DGGML_RPC=on)")
    called = getattr(ctypes.CDLL(str(file)), function)
    called.restype, called.argtypes = result, arguments
    return called


def serve(address: str) -> None:
    """Be one of llama.cpp's RPC workers, with one thread, until killed."""
    cpu = ggml("ggml", "ggml_backend_dev_by_type", POINTER, ctypes.c_int)(0)
    start = ggml(
        "ggml-rpc", "ggml_backend_rpc_start_server", None, TEXT, TEXT, SIZE, SIZE, ctypes.POINTER(POINTER)
    )
    start(address.encode(), None, 1, 1, (POINTER * 1)(cpu))


def rpc_devices(addresses: list[str]) -> Any:
    """Those of RPC workers, as llama.cpp takes them."""
    add = ggml("ggml-rpc", "ggml_backend_rpc_add_server", POINTER, TEXT)
    register = ggml("ggml", "ggml_backend_register", None, POINTER)
    device = ggml("ggml-base", "ggml_backend_reg_dev_get", POINTER, POINTER, SIZE)
    devices = []
    for address in addresses:
        registry = add(address.encode())
        register(registry)
        devices.append(device(registry, 0))
    return (POINTER * (len(devices) + 1))(*devices, None)


def measure(args: argparse.Namespace) -> None:
    """For each line on stdin one run, and a JSON object about it on stdout."""
    prompt, generate = args.prompt, args.generate
    model_params = lib.llama_model_default_params()
    model_params.n_gpu_layers = 0
    if args.workers:
        devices = rpc_devices(args.workers)
        model_params.devices = ctypes.cast(devices, POINTER)
        model_params.n_gpu_layers = MANY_LAYERS
        model_params.split_mode = getattr(lib, f"LLAMA_SPLIT_MODE_{args.split.upper()}")
    model = lib.llama_model_load_from_file(args.file.encode(), model_params)
    params = lib.llama_context_default_params()
    params.n_ctx = prompt + generate
    params.n_batch = prompt
    params.n_ubatch = args.micro_batch or params.n_ubatch
    params.n_threads = params.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, params) if model else None
    if not context:
        sys.exit(f"llama.cpp could not load {args.file}")
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
