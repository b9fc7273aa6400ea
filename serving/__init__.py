"""From an artifact to answers: features, scorer, ranking service, batch scoring, ``mlflow.pyfunc``.

Nothing here imports ``training``: a service needs an artifact, torch, and no more.
"""
