# largebatch with everything: docker build -t largebatch .
#   docker run --rm --gpus all -v "$PWD:/work" largebatch run optimizer=tvlars
FROM python:3.11-slim

# A C++ compiler for the fused optimizers and the augmentation, which are compiled at first use.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/largebatch
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY conf conf
COPY sweeps sweeps
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt '.[all]'

# Away from the sources: the installed package has its own presets.
WORKDIR /work
ENTRYPOINT ["largebatch"]
CMD ["--help"]
