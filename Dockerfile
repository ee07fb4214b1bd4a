# The page and the HTTP service on CPUs.
#
#   docker build --tag savl .
#   docker run --rm --publish 7860:7860 savl                                              # the page
#   docker run --rm --publish 8000:8000 savl serve --host 0.0.0.0                         # the service
#   docker run --rm --volume "$PWD:/pictures" --user "$(id -u)" savl upscale photo.jpg    # a file
#
# For Linux, pip installs a build of PyTorch for NVIDIA GPUs by default, which is several GB larger and works on CPUs too.
# To install one for CPUs, add --build-arg PIP_EXTRA_INDEX_URL=ADDRESS to the build, with the address of PyTorch's builds
# for CPUs from pytorch.org, "Get Started".

FROM python:3.12-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt torch setuptools pybind11 ninja
COPY . .
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . && cp constraints.txt /wheels

FROM python:3.12-slim-bookworm
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /wheels/constraints.txt "$(echo /wheels/savl-*.whl)[web,serve,video,models]"
RUN useradd --create-home --uid 1000 savl
USER 1000
WORKDIR /pictures
# The page and the service listen on 7860 and 8000; savl itself binds to 127.0.0.1, which no port of a container reaches.
EXPOSE 7860 8000
ENTRYPOINT ["savl"]
CMD ["web", "--host", "0.0.0.0", "--port", "7860", "--no-browser"]
