"""One thin subclass of TRL's GRPOTrainer and what it needs: a prompt becomes a gradient here."""

import logging
import os

# Read by vLLM when it is imported, which TRL does by itself. One process, so that weights are loaded in place; and no
# pinning of threads, which would bind the trainer's too.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what verbs answer stands on standard output
logging.getLogger("vllm").setLevel(logging.ERROR)  # it speaks before it reads its own setting
