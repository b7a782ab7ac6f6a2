# docker build -t surgeon . && docker run --gpus all -v "$PWD:/work" surgeon prune MODEL OUT
# The devel image has nvcc, which builds the CUDA kernels once for the architectures named here.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-dev python3-pip python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/surgeon PATH=/opt/surgeon/bin:$PATH TORCH_CUDA_ARCH_LIST="8.0 9.0"
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir "setuptools>=77" ninja "torch>=2.11"
COPY . /src
RUN cd /src && SURGEON_CUDA=1 pip install --no-cache-dir --no-build-isolation . && rm -rf /src
WORKDIR /work
ENTRYPOINT ["surgeon"]
