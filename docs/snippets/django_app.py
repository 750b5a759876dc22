"""A whole Django project in one file: what stands in `project/asgi.py` is its last line."""

import os

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path

settings.configure(SECRET_KEY="not for production", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)
django.setup()


async def index(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"process {os.getpid()}")


urlpatterns = [path("", index)]

application = get_asgi_application()
