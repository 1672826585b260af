# ds_compress with its dependencies in an image without a compiler: docs/installation.md says how to build it.
#
# The kernels are compiled in the first stage; the second passes the smoke test, or there is no image.
ARG BASE=python:3.12-slim-bookworm

FROM python:3.12-slim-bookworm AS builder
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# 1 compiles the CUDA kernels too, with the nvcc of the extra `cuda-build`.
ARG CUDA=0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "${TORCH}" --index-url "${TORCH_INDEX}"
WORKDIR /source
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
RUN if [ "${CUDA}" = 1 ]; then \
        python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['cuda-build'], sep='\n')" > cuda-build.txt \
        && pip install --no-cache-dir -r cuda-build.txt; \
    fi
COPY csrc csrc
COPY benchmarks benchmarks
COPY ds_compress ds_compress
RUN DS_COMPRESS_BUILD_OPS=1 DS_COMPRESS_CUDA="${CUDA}" pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# A base of CUDA has no Python.
# hadolint ignore=DL3008
RUN if ! command -v python3 > /dev/null; then \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir "${TORCH}" --index-url "${TORCH_INDEX}"
COPY --from=builder /wheels /wheels
RUN /opt/venv/bin/pip install --no-cache-dir /wheels/*.whl \
    && useradd --create-home --uid 10001 user
ENV PATH=/opt/venv/bin:${PATH}
USER 10001
WORKDIR /home/user
COPY tests/e2e/smoke.py /opt/smoke.py
RUN python /opt/smoke.py
CMD ["ds_compress", "doctor"]
