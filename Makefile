PYTHON ?= python3

# After installing, nothing here needs a network.
export HF_HUB_OFFLINE = 1
# Waiting threads sleep instead of spinning: on two cores, spinning makes training many times slower as soon as anything
# else is running.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: quickstart test conformance

# Pretrains a small model on the Python standard library, then samples from it in a new process.
quickstart: .venv/installed
	.venv/bin/python scripts/pretrain.py configs/quickstart.yaml
	.venv/bin/python scripts/generate.py outputs/quickstart

test: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

# torch goes first and pinned: without the pin, its newest release and the libraries of its GPU build would be
# downloaded before pip finds out that another one is wanted.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt torch
	.venv/bin/python -m pip install -c constraints.txt -e '.[train,triton,test]'
	touch $@

# Runs transformers' own model tests, which are downloaded, against DDL and Llama: half an hour on two cores.
conformance: .venv/installed
	.venv/bin/python tests/conformance/run.py
