# make demo    optimise a small model and train it beside the original
# make test    the test suite (tests/gpu is skipped without a GPU)
# make test-processes    its last part alone: DDP, FSDP and DeepSpeed, in two processes
# make lint    ruff
# make clean   remove the virtual environment and what the tools left behind

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-processes lint clean

demo: $(INSTALLED)
	$(VENV)/bin/python -m ligerfx.demo

# Not `python -m pytest`: that puts this folder on sys.path, where kernels/ would pass for HuggingFace's package.
test: $(INSTALLED)
	$(VENV)/bin/pytest -n 2 --dist worksteal
	$(MAKE) test-processes

# By themselves: each test has two processes already, which wait for each other.
test-processes: $(INSTALLED)
	LIGERFX_PROCESSES=1 $(VENV)/bin/pytest tests/training/test_distributed.py tests/training/test_deepspeed.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .

# The stamp is newer than what it was made from, so a second `make` installs nothing.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
