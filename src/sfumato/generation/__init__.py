"""From a trained model to images: requests, and the pipeline that answers them."""
