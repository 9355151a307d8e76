# One image with every program, each linked statically: there is nothing else in it.
#
#   docker build -t ebpf-collector .                     compiles inside a Rust image
#   docker build -t ebpf-collector --target prebuilt .   takes dist/ as `cargo xtask dist` left it; no base image is pulled
#
# The node agent needs root (uid 0) and, of root's rights, only the capabilities in docs/CAPABILITIES.md:
#   docker run --user 0 --cap-drop ALL --cap-add BPF --cap-add PERFMON --cap-add NET_ADMIN --cap-add SYS_PTRACE \
#     --cap-add DAC_READ_SEARCH --cap-add SYS_RESOURCE --pid host --cgroupns host --network host ebpf-collector node-agent ...
# Aggregator and operator need none and run as the image's user.
#
# Engines without BuildKit build the stages in order up to the target: what `prebuilt` needs comes first.

FROM scratch AS base
LABEL org.opencontainers.image.title="ebpf-collector" \
      org.opencontainers.image.description="eBPF network observability: node agent, aggregator and operator" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/usr/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
USER 65532:65532

FROM base AS prebuilt
COPY dist/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY dist/node-agent dist/aggregator dist/operator /usr/bin/

FROM rust:1.95.0-bookworm AS build
WORKDIR /src
COPY . .
RUN scripts/setup.sh build && . scripts/lib.sh && cargo xtask dist

FROM base AS image
COPY --from=build /src/dist/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/dist/node-agent /src/dist/aggregator /src/dist/operator /usr/bin/
