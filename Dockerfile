# The t5x command with what TPUs need, for Kubernetes (docs/gke-jobset.yaml) or any other place.
#   docker build --tag=REGION-docker.pkg.dev/PROJECT/REPOSITORY/codellm_jax:COMMIT .
FROM python:3.11-slim

WORKDIR /opt/codellm_jax
COPY setup.py pyproject.toml README.md requirements.lock ./
COPY codellm_jax codellm_jax
COPY tasks tasks
COPY gin gin
RUN pip install --no-cache-dir --constraint requirements.lock '.[tpu]'

# A TPU's driver locks memory, which GKE grants to root alone; there the manifest says so. All else needs no root.
RUN useradd --create-home t5x
USER t5x
WORKDIR /home/t5x
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["t5x"]
