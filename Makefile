# Each target is a few commands that can be typed without make. On Windows:
#
#   make demo    python tools\bootstrap.py    then    .venv\Scripts\python -m demo.run
#   make test    python tools\bootstrap.py    then    .venv\Scripts\python -m pytest
#
# COMFYUI_PATH=/path/to/ComfyUI makes demo and tests use that copy; ARGS="..." goes to the demo or to pytest.

PYTHON ?= python3
VENV := .venv/bin
DEVICE_CODE = $(shell find csrc tests/kernels/emulation -name '*.[ch]' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: demo test browser lint format bootstrap clean

demo: bootstrap
	$(VENV)/python -m demo.run $(ARGS)

test: bootstrap
	$(VENV)/python -m pytest $(ARGS)

# Chromium, which the browser tests need: Debian's and Ubuntu's. Elsewhere install one by hand, or they skip.
ROOT = $(if $(filter 0,$(shell id -u)),,sudo -n)
APT = $(ROOT) env DEBIAN_FRONTEND=noninteractive apt-get -qq

browser:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		$(APT) update && $(APT) install -y --no-install-recommends chromium; }

lint: bootstrap
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(if $(DEVICE_CODE),$(VENV)/clang-format --dry-run --Werror $(DEVICE_CODE))

format: bootstrap
	$(VENV)/ruff check --fix
	$(VENV)/ruff format
	$(if $(DEVICE_CODE),$(VENV)/clang-format -i $(DEVICE_CODE))

bootstrap:
	@$(PYTHON) tools/bootstrap.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
