# decdec serve in a container. Kernels are compiled for the card on the first start: NVRTC and cuBLAS come from PyPI,
# the driver from the host (the NVIDIA container toolkit). Without a GPU it runs on the CPU.
#
#   docker build -t decdec --build-arg COMMIT=$(git rev-parse --short=9 HEAD) .
#   docker run --rm -p 8000:8000 -v decdec:/data decdec run HuggingFaceTB/SmolLM2-135M-Instruct --prompt Hello
FROM rust:1.95-bookworm AS build
ARG COMMIT=
WORKDIR /source
COPY . .
RUN DECDEC_COMMIT=$COMMIT cargo build --release --locked --bin decdec

FROM python:3.13-slim-bookworm
RUN pip install --no-cache-dir nvidia-cuda-nvrtc-cu12==12.8.* nvidia-cublas-cu12==12.8.* \
    && useradd --create-home --uid 1000 decdec \
    && install -d -o decdec /data
COPY --from=build /source/target/release/decdec /usr/local/bin/decdec
USER 1000
# What is downloaded, quantized and compiled outlives the container in the volume.
ENV HF_HOME=/data/huggingface DECDEC_CACHE_DIR=/data/decdec NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /data
EXPOSE 8000
ENTRYPOINT ["decdec"]
CMD ["--help"]
