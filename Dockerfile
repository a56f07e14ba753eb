# One image for every member: coordinator, peer, trainer. CPU, not root, state in /state.
#
# pip takes the torch wheel it is offered; to spare the image gigabytes of CUDA, offer it the CPU wheels:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's index of CPU wheels> -t swarmoe .
FROM python:3.11-slim-bookworm AS build
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
WORKDIR /source
RUN python -m venv /opt/swarmoe
ENV PATH=/opt/swarmoe/bin:$PATH
# Dependencies first: they change seldom and take minutes.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt && pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/swarmoe /opt/swarmoe
RUN useradd --create-home --uid 10001 swarmoe && install -d -o swarmoe -g swarmoe /state
USER 10001:10001
WORKDIR /state
VOLUME /state
# One thread a process: several share the cores, and torch threads that wait for each other crawl.
ENV PATH=/opt/swarmoe/bin:$PATH OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 SWARMOE_HTTP=127.0.0.1:8080
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as http; http.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["swarmoe"]
CMD ["--help"]
