"""What MLflow runs to make the model: "models from code", so that nothing is pickled.

This file is given to ``mlflow.pyfunc.save_model`` as ``python_model``; nothing here imports it.
"""

from mlflow.models import set_model

from serving.pyfunc import RankingPyfunc

set_model(RankingPyfunc())
